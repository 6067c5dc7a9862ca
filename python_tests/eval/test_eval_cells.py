# SPDX-License-Identifier: Apache-2.0
"""Cells of a run: what determines a key, what is computed, and in which order.

The tests also cover crashes, dropped files and broken records. The steps only add numbers.
"""

import json
import shutil

import pytest

from dualhead_ext.eval.paper import cells, report
from dualhead_ext.eval.paper.cells import Cell, Step, Store

COUNTER = {"runs": 0}


def make(cell, store, folder):
    """Write the sum of the cell's number and its needs' numbers. Each call gives a new digest."""
    COUNTER["runs"] += 1
    total = cell.options["n"] + sum(
        int((store.folder(need) / "n").read_text()) for need in cell.needs.values()
    )
    folder.mkdir(parents=True)
    (folder / "n").write_text(str(total))
    (folder / "ballast").write_bytes(bytes(cell.options.get("bytes", 0)))
    return {"n": total, "weights": f"run {COUNTER['runs']}"}


def read(cell, store, folder):
    assert folder is None
    return {"n": int((store.folder(cell.needs["of"]) / "n").read_text())}


def fail(cell, store, folder):
    folder.mkdir(parents=True)
    raise KeyboardInterrupt


STEPS = {"make": Step(make, writes=True), "read": Step(read), "fail": Step(fail, writes=True)}


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path, STEPS)


def chain(n=1, **others):
    base = Cell("make", "base", {"n": n} | others)
    top = Cell("make", "top", {"n": 10}, {"below": base})
    return base, top, Cell("read", "reader", {}, {"of": top})


def computed(found, store, **options):
    return [cell.label for cell in cells.run(found, store, **options).computed]


def test_needs_come_first_and_nothing_is_computed_twice(store):
    *_, reader = chain()
    assert computed([reader, reader], store) == ["base", "top", "reader"]
    assert store.result(reader) == {"n": 11}
    assert computed([reader], store) == []


def test_a_key_is_of_all_that_decides_the_result_and_of_nothing_else(monkeypatch):
    *_, reader = chain()
    assert reader.key == chain()[2].key
    assert Cell("read", "another label", {}, reader.needs).key == reader.key
    assert chain(n=2)[2].key != reader.key  # an option of a cell that the needed cell needs
    assert Cell("make", "", {"n": 1}).key != Cell("read", "", {"n": 1}).key
    monkeypatch.setattr(cells, "RECIPE", cells.RECIPE + 1)
    assert chain()[2].key != reader.key


def test_a_crash_loses_the_cell_it_was_in_and_leaves_no_record_of_it(store):
    base, top, reader = chain()
    crash = Cell("fail", "crash", {}, {"base": base})
    with pytest.raises(KeyboardInterrupt):
        cells.run([base, crash, reader], store)
    assert store.done(base) and not store.done(crash) and not store.done(top)
    store.steps = STEPS | {"fail": STEPS["make"]}
    crash.options["n"] = 5
    assert computed([base, crash, reader], store) == ["crash", "top", "reader"]


def test_files_that_are_gone_are_made_again_only_where_something_left_reads_them(store):
    base, top, reader = chain(bytes=100)
    cells.run([top], store)
    assert store.drop_files([base, top], [], limit=store.bytes_held() - 1) == [base]
    # top's files are still there, and nothing else is read
    assert computed([reader], store) == ["reader"]
    assert store.drop_files([top], [], limit=store.bytes_held() - 1) == [top]
    another = Cell("read", "another", {"x": 1}, {"of": top})
    assert computed([another], store) == ["base", "top", "another"]
    assert computed([reader, another, base], store) == []


def test_room_is_made_from_what_nothing_needs_first_and_then_from_the_largest(store):
    made = [Cell("make", f"{n} kB", {"n": n, "bytes": 1000 * n}) for n in (5, 9, 3, 7)]
    cells.run(made, store)
    wanted = [Cell("read", "", {"n": n}, {"of": made[n]}) for n in (0, 1)]
    records = store.bytes_held() - 24_000
    dropped = store.drop_files(made, wanted, records + 6_000)
    assert [cell.label for cell in dropped] == ["7 kB", "3 kB", "9 kB"]
    with pytest.raises(RuntimeError, match="bytes of records, more than 10"):
        store.drop_files(made, wanted, 10)


def test_time_that_runs_out_leaves_the_rest_for_the_next_call(store):
    found = [Cell("make", str(n), {"n": n}) for n in range(3)]
    outcome = cells.run(found, store, seconds=0)
    assert [len(outcome.computed), len(outcome.left)] == [1, 2]
    assert computed(found, store) == ["1", "2"]


def test_pieces_without_time_or_room_still_come_to_an_end(store):
    """Each piece adds one record, although every file is dropped and must be computed again."""
    *_, reader = chain(bytes=1000)
    for labels in (["base"], ["base", "top"], ["base", "top", "reader"], []):
        assert computed([reader], store, seconds=0) == labels
        for folder in (store.out / "files").iterdir():
            shutil.rmtree(folder)
    assert store.result(reader) == {"n": 11}


def test_a_long_step_is_not_started_when_too_little_time_is_left(store, monkeypatch):
    first, second = (Cell("make", str(n), {"n": n}) for n in (1, 2))
    cells.run([first], store)
    record = store.record(first) | {"seconds": 100}
    store._path(first).write_text(json.dumps(record))
    short = Cell("fail", "", {"n": 3})
    store.steps = STEPS | {"fail": STEPS["make"]}
    assert cells.run([short, first, second], store, seconds=99).left == [second]
    assert cells.run([first, second], store, seconds=101).left == []


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"key": "other"}', "{"])
def test_a_broken_record_is_named(store, text):
    base, *_ = chain()
    cells.run([base], store)
    store._path(base).write_text(text)
    with pytest.raises(ValueError, match=f"make-{base.key}.json must be"):
        store.result(base)


def test_a_missing_result_is_named(store):
    with pytest.raises(LookupError, match=r"base \(make-[0-9a-f]{16}\) was not computed"):
        store.result(chain()[0])


def test_a_result_that_is_not_a_number_leaves_no_record(store):
    store.steps = {"make": Step(lambda *_: {"loss": float("nan")})}
    with pytest.raises(ValueError, match="JSON compliant"):
        store.compute(chain()[0])
    assert not store.done(chain()[0])


def test_a_record_names_the_machine_the_needs_and_the_weights_that_were_read(store):
    _, top, reader = chain()
    cells.run([reader], store)
    record = store.record(reader)
    assert record["needs"] == {"of": top.name}
    assert record["weights"] == {"of": store.result(top)["weights"]}
    assert {"device", "commit", "torch", "csrc_sha256"} <= record["environment"].keys()


def test_figures_of_weights_that_were_made_anew_are_told_from_earlier_ones(store):
    base, _, reader = chain()
    cells.run([reader], store)
    assert report.other_weights([reader], store) == []
    store.compute(base)
    assert report.other_weights([reader], store) == [
        "top was computed with other weights of below than others."
    ]
