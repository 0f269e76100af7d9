// spu::pack and spu::unpack: wire format version 1 (math/wire.h).
#include "cpu/ops.h"

#include <cstring>

#include "cpu/tensors.h"
#include "torch/wire.h"

namespace spu::cpu {
namespace {

Type payload_type(wire::Codec codec) {
  return codec == wire::Codec::fp16 ? Type::fp16 : Type::bf16;
}

// The parts of a wire buffer for numel values.
struct Parts {
  int64_t scales = sizeof(wire::Header), payload, end;
  Parts(int64_t numel, wire::Codec codec)
      : payload(scales + wire::scale_bytes(numel, codec)), end(wire::wire_bytes(numel, codec)) {}
};

}  // namespace

Tensor pack(Tensor x, Text codec_name) {
  checks::expect_cpu("pack", "x", x);
  const wire::Codec codec = wire::codec_of("pack", codec_name);
  const Type type = storage_type("pack", "x", x);
  wire::expect_dims("pack", x);
  const int64_t numel = x.numel();
  const Parts parts(numel, codec);
  const Tensor values = dense(x);
  Tensor out = new_empty(x, {parts.end}, ScalarType::Byte);
  uint8_t* bytes = static_cast<uint8_t*>(out.mutable_data_ptr());
  const wire::Header h = wire::header_of(x, type, codec);
  std::memcpy(bytes, &h, sizeof h);
  const KernelTable& k = kernels();
  if (!wire::is_plain(codec)) {
    const int64_t blocks = wire::block_count(numel, codec), scale_end = parts.scales + 4 * blocks;
    std::memset(bytes + scale_end, 0, static_cast<size_t>(parts.payload - scale_end));
    float* scales = reinterpret_cast<float*>(bytes + parts.scales);
    uint8_t* codes = bytes + parts.payload;
    for_ranges(blocks, kGrain / wire::block_of(codec), [&](int64_t begin, int64_t end) {
      if (codec == wire::Codec::int8) {
        int8_t* integers = reinterpret_cast<int8_t*>(codes);
        k.int8_encode(type, values.const_data_ptr(), numel, scales, integers, begin, end);
      } else {
        k.small_encode(codec, type, values.const_data_ptr(), numel, scales, codes, begin, end);
      }
    });
  } else {
    for_ranges(numel, kGrain, [&](int64_t begin, int64_t end) {
      k.convert(type, values.const_data_ptr(), payload_type(codec), bytes + parts.payload, begin, end);
    });
  }
  const int64_t payload_end = parts.payload + wire::payload_bytes(numel, codec);
  std::memset(bytes + payload_end, 0, static_cast<size_t>(parts.end - payload_end));
  return out;
}

Tensor unpack(Tensor wire_tensor, std::vector<int64_t> shape, ScalarType dtype, Text codec_name) {
  checks::expect_cpu("unpack", "wire", wire_tensor);
  const wire::Codec codec = wire::codec_of("unpack", codec_name);
  const int64_t numel = wire::numel_of("unpack", shape);
  wire::expect_wire("unpack", wire_tensor, numel, codec, codec_name);
  const Parts parts(numel, codec);
  Tensor out = new_empty(wire_tensor, shape, dtype);
  const Type type = storage_type("unpack", "dtype", out);
  Tensor buffer = dense(wire_tensor);
  // Scales are read as floats: a view that begins at an odd byte is copied.
  if (reinterpret_cast<uintptr_t>(buffer.const_data_ptr()) % alignof(float) != 0) buffer = torch::stable::clone(buffer);
  const uint8_t* bytes = static_cast<const uint8_t*>(buffer.const_data_ptr());
  void* values = out.mutable_data_ptr();
  const KernelTable& k = kernels();
  if (!wire::is_plain(codec)) {
    const float* scales = reinterpret_cast<const float*>(bytes + parts.scales);
    const uint8_t* codes = bytes + parts.payload;
    for_ranges(wire::block_count(numel, codec), kGrain / wire::block_of(codec), [&](int64_t begin, int64_t end) {
      if (codec == wire::Codec::int8) {
        const int8_t* integers = reinterpret_cast<const int8_t*>(codes);
        k.int8_decode(type, values, numel, scales, integers, begin, end);
      } else {
        k.small_decode(codec, type, values, numel, scales, codes, begin, end);
      }
    });
  } else {
    for_ranges(numel, kGrain, [&](int64_t begin, int64_t end) {
      k.convert(payload_type(codec), bytes + parts.payload, type, values, begin, end);
    });
  }
  return out;
}

}  // namespace spu::cpu
