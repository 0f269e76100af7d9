// A string argument of an op. Read as std::string (torch 2.11 to 2.13) every call leaves one on the heap: 48 bytes, for
// ever, that lie between tensors, so that a heap made of aligned blocks cannot use their places again and grows.
#pragma once

#include <torch/csrc/stable/stableivalue_conversions.h>
#include <torch/headeronly/util/shim_utils.h>

#include <string>

namespace spu {

struct Text : std::string {
  using std::string::string;
};

}  // namespace spu

namespace torch {
namespace stable {
namespace detail {

template <>
struct ToImpl<spu::Text> {
  static spu::Text call(StableIValue value, [[maybe_unused]] uint64_t version, [[maybe_unused]] bool is_internal) {
    const StringHandle handle = to<StringHandle>(value);
    size_t length = 0;
    const char* data = nullptr;
    TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
    TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
    spu::Text text(data, length);
    TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
    return text;
  }
};

}  // namespace detail
}  // namespace stable
}  // namespace torch
