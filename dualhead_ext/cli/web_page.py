# SPDX-License-Identifier: Apache-2.0
"""The page of ``dualhead demo --web``. It fetches nothing but ``/reply`` of its own server, and
puts what the model says into text nodes, never into markup.
"""

PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>dualhead</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body { font: 16px/1.5 system-ui, sans-serif; color: #111; background: #fff; max-width: 64rem;
  margin: 2rem auto; padding: 0 1rem; }
textarea { width: 100%; box-sizing: border-box; font: inherit; padding: .5rem; }
.controls { display: flex; flex-wrap: wrap; gap: 1rem; align-items: center; margin: .6rem 0 1rem; }
input[type=range] { width: 16rem; vertical-align: middle; }
button { font: inherit; padding: .3rem 1.2rem; }
.replies { display: grid; grid-template-columns: repeat(auto-fit, minmax(18rem, 1fr)); gap: 1rem; }
section { border: 1px solid #ccc; border-radius: .4rem; padding: .6rem 1rem; min-height: 8rem; }
h2 { font-size: 1rem; margin: 0 0 .4rem; color: #444; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.8; }
.text span, #legend span { padding: .15rem 0; color: #111; }
#legend span { padding: .15rem .4rem; }
#note { color: #555; min-height: 1.5rem; }
</style></head>
<body>
<h1>The backbone, and with the reward head</h1>
<form>
<textarea id="prompt" rows="3" aria-label="prompt">How do I make friends in a new city?</textarea>
<div class="controls">
<label>strength <input id="strength" type="range" min="0" max="4" step="0.1" value="1">
<output id="value">1.0</output></label>
<button id="go">Answer</button>
</div>
</form>
<div class="replies">
<section><h2>backbone (strength 0)</h2>
<div class="text" id="reply0" aria-live="polite"></div></section>
<section><h2>strength <span id="shown">1.0</span></h2>
<div class="text" id="reply1" aria-live="polite"></div></section>
</div>
<p id="legend"></p>
<p id="note"></p>
<script>
const at = id => document.getElementById(id);
const replies = [at("reply0"), at("reply1")];
let events = null;
function add(parent, text, alpha, color) {
  const span = parent.appendChild(document.createElement("span"));
  span.textContent = text;
  if (color) span.style.background = color;
  if (alpha) span.title = "alpha " + alpha;
}
function finish(note) {
  events.close();
  events = null;
  at("go").textContent = "Answer";
  at("note").textContent = note;
}
function stop() { finish("stopped"); }
function take(event) {
  const said = JSON.parse(event.data);
  if (said.error) finish(said.error);
  else if (said.done) finish("done");
  else if (said.tokens) {
    said.tokens.forEach((tokens, side) => {
      replies[side].replaceChildren();
      tokens.forEach(token => add(replies[side], ...token));
    });
    if (said.legend.length) at("legend").textContent = "alpha ";
    said.legend.forEach(([number, color]) => add(at("legend"), number, null, color));
    if (said.legend.length) at("legend").append(" (0: backbone, 1: reward head)");
  } else replies[said.side].append(said.text);
}
at("strength").addEventListener("input", () => {
  at("value").textContent = Number(at("strength").value).toFixed(1);
});
document.querySelector("form").addEventListener("submit", submitted => {
  submitted.preventDefault();
  if (events) { stop(); return; }
  replies.forEach(reply => reply.replaceChildren());
  at("legend").replaceChildren();
  at("shown").textContent = at("value").textContent;
  at("note").textContent = "answering …";
  at("go").textContent = "Stop";
  const asked = new URLSearchParams({
    prompt: at("prompt").value, strength: at("strength").value });
  events = new EventSource("/reply?" + asked);
  events.onmessage = take;
  events.onerror = () => { if (events) finish("the server does not answer"); };
});
</script>
</body></html>
"""
