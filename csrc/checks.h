// SPDX-License-Identifier: Apache-2.0
// Errors of the operators, worded the same on every device: operator, argument, expected, got. For
// example: "decode_step: hidden must be (B, 4096), got (2, 4095)".
//
// Arguments are checked here, before any kernel and any torch call that could fail: an error raised
// inside those loses its text at the boundary of the stable ABI. Only RuntimeError crosses the
// boundary; dualhead_ext/ops turns it into the right Python type.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>

namespace dualhead {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

[[noreturn]] inline void fail(const char* op, const std::string& what) {
  throw std::runtime_error(std::string(op) + ": " + what);
}

inline const char* dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Float8_e4m3fn:
      return "float8_e4m3fn";
    case ScalarType::Bool:
      return "bool";
    default:
      return "another dtype";
  }
}

// An expected dimension: a size, or a letter if any size is allowed.
struct Dim {
  Dim(int64_t size) : size(size), letter(nullptr) {}     // NOLINT: {B, d} reads as a shape
  Dim(const char* letter) : size(-1), letter(letter) {}  // NOLINT
  int64_t size;
  const char* letter;
};

inline std::string shape_text(std::initializer_list<Dim> dims) {
  std::string text = "(";
  for (const Dim& dim : dims) {
    if (text.size() > 1) text += ", ";
    text += dim.letter ? std::string(dim.letter) : std::to_string(dim.size);
  }
  return text + (dims.size() == 1 ? ",)" : ")");
}

inline std::string shape_text(const Tensor& tensor) {
  std::string text = "(";
  for (int64_t i = 0; i < tensor.dim(); ++i) {
    if (i > 0) text += ", ";
    text += std::to_string(tensor.size(i));
  }
  return text + (tensor.dim() == 1 ? ",)" : ")");
}

inline void check_shape(const char* op, const char* name, const Tensor& tensor,
                        std::initializer_list<Dim> dims) {
  bool same = tensor.dim() == static_cast<int64_t>(dims.size());
  int64_t i = 0;
  for (const Dim& dim : dims) {
    same = same && (dim.letter || tensor.size(i) == dim.size);
    ++i;
  }
  if (!same) {
    fail(op, std::string(name) + " must be " + shape_text(dims) + ", got " + shape_text(tensor));
  }
}

inline void check_dtype(const char* op, const char* name, const Tensor& tensor, ScalarType dtype) {
  if (tensor.scalar_type() != dtype) {
    fail(op, std::string(name) + " must have dtype " + dtype_name(dtype) + ", got " +
                 dtype_name(tensor.scalar_type()));
  }
}

inline std::string device_text(const Tensor& tensor) {
  return tensor.is_cpu() ? "cpu" : "device " + std::to_string(tensor.get_device_index());
}

inline void check_device(const char* op, const char* name, const Tensor& tensor, const Tensor& like,
                         const char* like_name = "hidden") {
  if (tensor.is_cpu() != like.is_cpu() || tensor.is_cuda() != like.is_cuda() ||
      tensor.get_device_index() != like.get_device_index()) {
    fail(op, std::string(name) + " must be on the device of " + like_name + " (" +
                 device_text(like) + "), got " + device_text(tensor));
  }
}

inline void check_contiguous(const char* op, const char* name, const Tensor& tensor) {
  if (!tensor.is_contiguous()) {
    fail(op, std::string(name) + " must be contiguous, got strides of another layout");
  }
}

// Rows may have any stride, but the elements of a row must be adjacent.
inline void check_adjacent(const char* op, const char* name, const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  if (tensor.size(last) > 1 && tensor.stride(last) != 1) {
    fail(op, std::string(name) + " must have adjacent elements in each row, got stride " +
                 std::to_string(tensor.stride(last)) + " in its last dimension");
  }
}

}  // namespace dualhead
