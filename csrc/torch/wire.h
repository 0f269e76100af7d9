// The wire's header (format version 1, math/wire.h) from a tensor, and the checks of pack and unpack.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstring>
#include <string>
#include <vector>

#include "math/types.h"
#include "math/wire.h"
#include "torch/checks.h"

namespace spu::wire {

inline Codec codec_of(const char* op, const std::string& name) {
  if (name == "fp16") return Codec::fp16;
  if (name == "bf16") return Codec::bf16;
  if (name == "int8") return Codec::int8;
  if (name == "int4") return Codec::int4;
  if (name == "fp8_e4m3") return Codec::fp8_e4m3;
  if (name == "fp8_e5m2") return Codec::fp8_e5m2;
  checks::fail("spu::", op, ": unknown codec '", name, "'; choose fp16, bf16, int8, int4, fp8_e4m3 or fp8_e5m2");
}

inline Header header_of(const Tensor& x, Type type, Codec codec) {
  Header h;
  std::memset(&h, 0, sizeof h);
  std::memcpy(h.magic, "SPUW", 4);
  h.version = 1;
  h.codec = static_cast<uint8_t>(codec);
  h.source = static_cast<uint8_t>(type);
  h.ndim = static_cast<uint8_t>(x.dim());
  h.block = static_cast<uint32_t>(block_of(codec));
  h.numel = x.numel();
  for (int64_t i = 0; i < x.dim(); ++i) h.dims[i] = x.size(i);
  return h;
}

inline void expect_dims(const char* op, const Tensor& x) {
  if (x.dim() > kMaxDims) {
    checks::fail("spu::", op, ": x ", checks::shape(x), " has ", x.dim(), " dimensions; the wire holds up to ",
                 kMaxDims, ", flatten some");
  }
}

// The values of a shape that a caller gave.
inline int64_t numel_of(const char* op, const std::vector<int64_t>& shape) {
  int64_t numel = 1;
  for (int64_t size : shape) {
    if (size < 0) checks::fail("spu::", op, ": negative size ", size, " in shape");
    numel *= size;
  }
  return numel;
}

inline void expect_wire(const char* op, const Tensor& buffer, int64_t numel, Codec codec, const std::string& name) {
  checks::expect_dtype(op, "wire", buffer, ScalarType::Byte);
  if (buffer.numel() != wire_bytes(numel, codec)) {
    checks::fail("spu::", op, ": a wire of ", numel, " values in codec ", name, " has ", wire_bytes(numel, codec),
                 " bytes, got ", buffer.numel(), "; pass the shape and codec that were packed");
  }
}

}  // namespace spu::wire
