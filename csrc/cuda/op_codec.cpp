// spu::pack and spu::unpack on a CUDA device: wire format version 1 (math/wire.h).
#include <cstring>

#include "cuda/codec.h"
#include "cuda/ops.h"
#include "cuda/tensors.h"

namespace spu {
namespace cuda {
namespace {

using wire::Codec;

Codec codec_of(const char* op, const std::string& name) {
  if (name == "fp16") return Codec::fp16;
  if (name == "bf16") return Codec::bf16;
  if (name == "int8") return Codec::int8;
  if (name == "int4") return Codec::int4;
  if (name == "fp8_e4m3") return Codec::fp8_e4m3;
  if (name == "fp8_e5m2") return Codec::fp8_e5m2;
  checks::fail("spu::", op, ": unknown codec '", name, "'; choose fp16, bf16, int8, int4, fp8_e4m3 or fp8_e5m2");
}

wire::Header header_of(const Tensor& x, Type type, Codec codec) {
  wire::Header h;
  std::memset(&h, 0, sizeof h);
  std::memcpy(h.magic, "SPUW", 4);
  h.version = 1;
  h.codec = static_cast<uint8_t>(codec);
  h.source = static_cast<uint8_t>(type);  // Type and wire::Source share their numbers
  h.ndim = static_cast<uint8_t>(x.dim());
  h.block = static_cast<uint32_t>(wire::block_of(codec));
  h.numel = x.numel();
  for (int64_t i = 0; i < x.dim(); ++i) h.dims[i] = x.size(i);
  return h;
}

}  // namespace

Tensor pack(Tensor x, std::string codec_name) {
  expect_device("pack", "x", x, x);
  const Codec codec = codec_of("pack", codec_name);
  const Type type = storage_type("pack", "x", x);
  if (x.dim() > wire::kMaxDims) {
    checks::fail("spu::pack: x ", checks::shape(x), " has ", x.dim(), " dimensions; the wire holds up to ",
                 wire::kMaxDims, ", flatten some");
  }
  const Tensor values = dense(x);
  Tensor out = new_empty(x, {wire::wire_bytes(x.numel(), codec)}, ScalarType::Byte);
  const OnDevice on(x);
  launch_pack(codec, type, values.const_data_ptr(), header_of(x, type, codec),
              static_cast<uint8_t*>(out.mutable_data_ptr()), on.stream());
  return out;
}

Tensor unpack(Tensor wire_tensor, std::vector<int64_t> shape, ScalarType dtype, std::string codec_name) {
  expect_device("unpack", "wire", wire_tensor, wire_tensor);
  checks::expect_dtype("unpack", "wire", wire_tensor, ScalarType::Byte);
  const Codec codec = codec_of("unpack", codec_name);
  int64_t numel = 1;
  for (int64_t size : shape) {
    if (size < 0) checks::fail("spu::unpack: negative size ", size, " in shape");
    numel *= size;
  }
  if (wire_tensor.numel() != wire::wire_bytes(numel, codec)) {
    checks::fail("spu::unpack: a wire of ", numel, " values in codec ", codec_name, " has ",
                 wire::wire_bytes(numel, codec), " bytes, got ", wire_tensor.numel(),
                 "; pass the shape and codec that were packed");
  }
  Tensor out = new_empty(wire_tensor, shape, dtype);
  const Type type = storage_type("unpack", "dtype", out);
  Tensor buffer = dense(wire_tensor);
  // A view may start anywhere; scales and 16-bit payloads need their alignment.
  if (reinterpret_cast<uintptr_t>(buffer.const_data_ptr()) % 4 != 0) buffer = torch::stable::clone(buffer);
  const OnDevice on(wire_tensor);
  launch_unpack(codec, type, static_cast<const uint8_t*>(buffer.const_data_ptr()), out.mutable_data_ptr(), numel,
                on.stream());
  return out;
}

}  // namespace cuda
}  // namespace spu
