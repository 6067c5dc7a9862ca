// SPDX-License-Identifier: Apache-2.0
// The CUDA kernels on the host backend, and CPU kernels with emulated instructions, for pytest,
// without torch: takes NumPy arrays and writes the results in place. bfloat16 and float16 arrays
// are passed as uint16 bits. Strides are read from the arrays. Shapes are not checked; the binding
// of the operators does that.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "../decode_arguments.h"
#include "../kernels/cpu/decode.h"
#include "../kernels/cuda/decode.h"
#include "../kernels/cuda/loss.h"
#include "../kernels/cuda/primitives.cuh"
#include "../kernels/cuda/stream_plan.h"
#ifdef __x86_64__
#include "host_x86/levels.h"
#endif

namespace py = pybind11;

namespace dualhead {
namespace {

// The data of arguments[name], whose items must have the size of T; null if it is missing or None.
template <typename T>
T* pointer(const py::dict& arguments, const char* name) {
  if (!arguments.contains(name) || arguments[name].is_none()) return nullptr;
  const auto array = py::reinterpret_borrow<py::array>(arguments[name]);
  if constexpr (!std::is_void_v<T>) {
    if (static_cast<size_t>(array.itemsize()) != sizeof(T)) {
      throw std::invalid_argument(std::string(name) + " must have items of " +
                                  std::to_string(sizeof(T)) + " bytes, got " +
                                  std::to_string(array.itemsize()));
    }
  }
  return static_cast<T*>(const_cast<void*>(array.data()));
}

int64_t stride(const py::array& array, int dimension) {
  return array.strides(dimension) / array.itemsize();
}

Quantization quantization_from(const std::string& name) {
  if (name == "int8") return Quantization::kInt8;
  if (name == "fp8") return Quantization::kFp8;
  if (name == "int4") return Quantization::kInt4;
  throw std::invalid_argument("format must be int8, fp8 or int4, got " + name);
}

RewardHead reward_head_from(const std::string& name) {
  if (name == "full") return RewardHead::kFull;
  if (name == "embedding") return RewardHead::kEmbedding;
  if (name == "lowrank") return RewardHead::kLowRank;
  throw std::invalid_argument("reward_head must be full, embedding or lowrank, got " + name);
}

// Fills a field from the array of that name (as a pointer) or from its number.
template <typename T>
void fill(T& field, const py::dict& arguments, const char* name) {
  if constexpr (std::is_pointer_v<T>) {
    field = pointer<std::remove_pointer_t<T>>(arguments, name);
  } else if constexpr (std::is_same_v<T, RewardHead>) {
    if (arguments.contains(name)) field = reward_head_from(arguments[name].cast<std::string>());
  } else {
    field = arguments[name].cast<T>();
  }
}

DecodeParams params_from(const py::dict& a, DType dtype) {
  const auto hidden = py::array(a["hidden"]), lm_weight = py::array(a["lm_weight"]);
  const bool full = a.contains("reward_weight");
  const auto reward = py::array(full ? a["reward_weight"] : a["reward_bias"]);
  DecodeParams p{};
  p.B = hidden.shape(0), p.d = hidden.shape(1), p.V = lm_weight.shape(0);
  p.K = reward.shape(0);
  if (a.contains("reward_down")) p.r = py::array(a["reward_down"]).shape(1);
  p.dtype = dtype;
  if (a.contains("cache_k")) {
    const auto cache_k = py::array(a["cache_k"]);
    p.H = cache_k.shape(1), p.S = cache_k.shape(2), p.d_k = cache_k.shape(3);
  }
  if (a.contains("format")) p.quantization = quantization_from(a["format"].cast<std::string>());
  fill(p.hidden, a, "hidden");
#define DUALHEAD_FILL(type, schema, name) fill(p.name, a, #name);
  DUALHEAD_DECODE_PARAMS(DUALHEAD_FILL)
#undef DUALHEAD_FILL
  p.hidden_stride = stride(hidden, 0), p.lm_weight_stride = stride(lm_weight, 0);
  if (full)
    p.reward_weight_stride_k = stride(reward, 0), p.reward_weight_stride = stride(reward, 1);
  fill(p.lm_product, a, "lm_product"), fill(p.reward_product, a, "reward_product");
  fill(p.out_logits, a, "out_logits"), fill(p.out_alpha, a, "out_alpha");
  fill(p.out_gate_logit, a, "out_gate_logit"), fill(p.out_token, a, "out_token");
  fill(p.out_logprob, a, "out_logprob"), fill(p.out_status, a, "out_status");
  fill(p.out_attention, a, "out_attention");
  return p;
}

DType dtype_from(const std::string& name) {
  if (name == "float32") return DType::kFloat32;
  if (name == "bfloat16") return DType::kBFloat16;
  if (name == "float16") return DType::kFloat16;
  throw std::invalid_argument("dtype must be float32, bfloat16 or float16, got " + name);
}

// Runs one step and returns the name of the launch's error. The workspace has exactly the requested
// size and is filled with the byte `dirt` before.
std::string decode_step(const py::dict& arguments, const std::string& dtype, int blocks,
                        int threads, int device, uint8_t dirt) {
  const DecodeParams params = params_from(arguments, dtype_from(dtype));
  const size_t bytes = cuda::decode_workspace_bytes(params);
  const std::unique_ptr<void, void (*)(void*)> workspace(std::aligned_alloc(256, bytes), std::free);
  std::memset(workspace.get(), dirt, bytes);
  return cudaGetErrorName(static_cast<cudaError_t>(
      cuda::decode_step(params, workspace.get(), device, nullptr, {blocks, threads})));
}

// The levels whose instructions are emulated, e.g. "emulated_amx".
std::vector<std::string> emulated_levels() {
  std::vector<std::string> names;
#ifdef __x86_64__
  for (const cpu::Kernels* level : cpu::kEmulatedLevels) names.push_back(level->name);
#endif
  return names;
}

// Ranges of any size down to `grain`, as threads may get them. The last one runs first.
void in_ranges(int64_t count, int64_t grain, cpu::RangeFunction body, void* context) {
  for (int64_t begin = (count - 1) / grain * grain; count > 0 && begin >= 0; begin -= grain) {
    body(begin, std::min(begin + grain, count), context);
  }
}

void in_one_range(int64_t count, int64_t, cpu::RangeFunction body, void* context) {
  body(0, count, context);
}

// One step of the CPU kernels of an emulated level, in the smallest ranges or in one. The workspace
// has exactly the requested size and is filled with the byte `dirt` before.
void emulated_decode_step(const py::dict& arguments, const std::string& dtype,
                          const std::string& level, bool ranges, uint8_t dirt) {
  const DecodeParams params = params_from(arguments, dtype_from(dtype));
  const size_t bytes = cpu::workspace_bytes(params);
  const std::unique_ptr<void, void (*)(void*)> workspace(std::aligned_alloc(64, bytes), std::free);
  std::memset(workspace.get(), dirt, bytes);
#ifdef __x86_64__
  for (const cpu::Kernels* kernels : cpu::kEmulatedLevels) {
    if (kernels->name != level) continue;
    cpu::decode_step(params, *kernels, workspace.get(), ranges ? &in_ranges : &in_one_range);
    return;
  }
#endif
  throw std::invalid_argument("no emulated level " + level);
}

LossRowsParams loss_params_from(const py::dict& a) {
  const auto z_rm = py::array(a["z_rm"]);
  LossRowsParams p{};
  p.n = z_rm.shape(0), p.V = z_rm.shape(1);
  p.z_lm = pointer<float>(a, "z_lm"), p.z_rm = pointer<float>(a, "z_rm");
  p.gate_logit = pointer<float>(a, "gate_logit"), p.labels = pointer<int64_t>(a, "labels");
  p.mix_probs = a["mix_probs"].cast<bool>();
  p.logit_scale = a["logit_scale"].cast<float>();
  p.logit_softcap = a["logit_softcap"].cast<float>();
  p.mixed = pointer<float>(a, "mixed"), p.reward = pointer<float>(a, "reward");
  p.mixed_normalizer = pointer<double>(a, "normalizers");
  p.rm_normalizer = p.mixed_normalizer + p.n;
  p.mixed_grad = pointer<float>(a, "mixed_grad"), p.reward_grad = pointer<float>(a, "reward_grad");
  p.gate_grad = pointer<float>(a, "gate_grad");
  p.write_lm = a.contains("write_lm") && a["write_lm"].cast<bool>();
  return p;
}

// Returns the name of the launch's error.
std::string loss_rows(const py::dict& arguments, bool backward, int device) {
  const auto kernel = backward ? cuda::loss_rows_backward : cuda::loss_rows;
  const int error = kernel(loss_params_from(arguments), device, nullptr);
  return cudaGetErrorName(static_cast<cudaError_t>(error));
}

void set_device(int multiprocessors, int blocks_per_multiprocessor, bool cooperative_launch,
                int compute_major, int compiled_major, int shared_kib, uintptr_t missing,
                uint64_t seed, int skipped_grid_barrier, int skipped_block_barrier,
                int skipped_copy_wait) {
  host_cuda::device() = {multiprocessors,
                         blocks_per_multiprocessor,
                         cooperative_launch,
                         compute_major,
                         compiled_major,
                         shared_kib * 1024,
                         missing,
                         {seed, skipped_grid_barrier, skipped_block_barrier, skipped_copy_wait}};
}

// The signals, fences and barriers of the last step: {address: (what, warp)}.
std::map<uintptr_t, std::pair<std::string, int>> orderings() {
  std::map<uintptr_t, std::pair<std::string, int>> found;
  for (const auto& [address, one] : host_cuda::orderings()) found[address] = {one.what, one.warp};
  return found;
}

// The plan of the streaming path; None if these arguments do not take that path.
py::object stream_plan(const py::dict& arguments, const std::string& dtype, int shared_kib,
                       int grid) {
  const DecodeParams params = params_from(arguments, dtype_from(dtype));
  cuda::StreamPlan plan;
  if (!cuda::decode_streams(params) || !cuda::make_plan(params, shared_kib * 1024, grid, &plan)) {
    return py::none();
  }
  py::dict found;
  found["batch_tile"] = plan.batch_tile, found["stages"] = plan.stages;
  found["blocks"] = plan.blocks, found["resident"] = plan.resident;
  found["shared_bytes"] = plan.shared_bytes, found["kept_tiles"] = plan.kept_tiles;
  found["under_way"] = plan.under_way, found["projects_early"] = plan.projects_early;
  return found;
}

template <typename T>
py::array_t<float> widened(const py::array_t<uint16_t>& bits) {
  py::array_t<float> out(bits.size());
  for (py::ssize_t i = 0; i < bits.size(); ++i) {
    out.mutable_data()[i] = cuda::to_float(T{bits.data()[i]});
  }
  return out;
}

template <typename T>
py::array_t<uint16_t> rounded(const py::array_t<float>& values) {
  py::array_t<uint16_t> out(values.size());
  for (py::ssize_t i = 0; i < values.size(); ++i) {
    out.mutable_data()[i] = cuda::from_float<T>(values.data()[i]).bits;
  }
  return out;
}

}  // namespace
}  // namespace dualhead

PYBIND11_MODULE(DUALHEAD_MODULE, m) {
  using namespace dualhead;  // NOLINT: only used for this list of names
  m.def("decode_step", &decode_step, py::arg("arguments"), py::arg("dtype"), py::arg("blocks") = 0,
        py::arg("threads") = 0, py::arg("device") = 0, py::arg("dirt") = 0xFF);
  m.def("emulated_levels", &emulated_levels);
  m.def("emulated_decode_step", &emulated_decode_step, py::arg("arguments"), py::arg("dtype"),
        py::arg("level"), py::arg("ranges") = false, py::arg("dirt") = 0xFF);
  m.def("loss_rows", &loss_rows, py::arg("arguments"), py::arg("backward"), py::arg("device") = 0);
  m.def("set_device", &set_device, py::kw_only(), py::arg("multiprocessors") = 4,
        py::arg("blocks_per_multiprocessor") = 2, py::arg("cooperative_launch") = true,
        py::arg("compute_major") = 9, py::arg("compiled_major") = 0, py::arg("shared_kib") = 227,
        py::arg("missing") = 0, py::arg("seed") = 0, py::arg("skipped_grid_barrier") = -1,
        py::arg("skipped_block_barrier") = -1, py::arg("skipped_copy_wait") = -1);
  m.def("orderings", &orderings);
  m.def("error_text", [](int error) { return std::string(cuda::error_text(error)); });
  m.def("bytes_copied", &host_cuda::bytes_copied);
  m.def("boxes_copied", &host_cuda::boxes_copied);
  m.def("wants_products", [](const py::dict& arguments, const std::string& dtype) {
    return cuda::decode_wants_products(params_from(arguments, dtype_from(dtype)));
  });
  m.def("stream_plan", &stream_plan, py::arg("arguments"), py::arg("dtype"),
        py::arg("shared_kib") = 227, py::arg("grid") = 132);
  m.def("bfloat16_to_float", &widened<BFloat16>);
  m.def("float16_to_float", &widened<cuda::Float16>);
  m.def("float_to_bfloat16", &rounded<BFloat16>);
  m.def("float_to_float16", &rounded<cuda::Float16>);
}
