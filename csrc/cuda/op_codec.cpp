// spu::pack, unpack, pack_, unpack_ (wire format version 1, math/wire.h) and copy_in_ on a CUDA device.
#include "cuda/codec.h"
#include "cuda/ops.h"
#include "cuda/tensors.h"
#include "cuda/transfer.h"
#include "torch/wire.h"

namespace spu::cuda {
namespace {

using wire::Codec;

// What pack and pack_ share: the checks of x, and the launch.
struct Packing {
  Codec codec;
  Type type;
  Tensor values;

  Packing(const char* op, const Tensor& x, const std::string& name)
      : codec(wire::codec_of(op, name)), type(storage_type(op, "x", x)), values(x) {
    expect_device(op, "x", x, x);
    wire::expect_dims(op, x);
    values = dense(x);
  }
  void into(uint8_t* out) const {
    const OnDevice on(values);
    launch_pack(codec, type, values.const_data_ptr(), wire::header_of(values, type, codec), out, on.stream());
  }
};

// A wire that is given: a view may start anywhere, but a kernel's scales and 16-bit values need their alignment. (A
// store at another address ends the process's use of the device.)
uint8_t* wire_data(const char* op, const Tensor& wire_tensor, const Tensor& like) {
  uint8_t* bytes = static_cast<uint8_t*>(device_address(op, "wire", wire_tensor, like));
  if (reinterpret_cast<uintptr_t>(bytes) % 4 != 0) {
    checks::fail("spu::", op, ": wire does not start at a multiple of 4 bytes; give it a tensor of its own");
  }
  return bytes;
}

}  // namespace

Tensor pack(Tensor x, Text codec_name) {
  const Packing packing("pack", x, codec_name);
  Tensor out = new_empty(x, {wire::wire_bytes(x.numel(), packing.codec)}, ScalarType::Byte);
  packing.into(static_cast<uint8_t*>(out.mutable_data_ptr()));
  return out;
}

void pack_into(Tensor x, Text codec_name, Tensor wire_tensor) {
  const Packing packing("pack_", x, codec_name);
  wire::expect_wire("pack_", wire_tensor, x.numel(), packing.codec, codec_name);
  packing.into(wire_data("pack_", wire_tensor, x));
}

Tensor unpack(Tensor wire_tensor, std::vector<int64_t> shape, ScalarType dtype, Text codec_name) {
  expect_device("unpack", "wire", wire_tensor, wire_tensor);
  const Codec codec = wire::codec_of("unpack", codec_name);
  const int64_t numel = wire::numel_of("unpack", shape);
  wire::expect_wire("unpack", wire_tensor, numel, codec, codec_name);
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

void unpack_into(Tensor wire_tensor, Text codec_name, Tensor out) {
  expect_device("unpack_", "out", out, out);
  const Codec codec = wire::codec_of("unpack_", codec_name);
  wire::expect_wire("unpack_", wire_tensor, out.numel(), codec, codec_name);
  const Type type = storage_type("unpack_", "out", out);
  const uint8_t* bytes = wire_data("unpack_", wire_tensor, out);
  Tensor values = dense(out);
  const OnDevice on(out);
  launch_unpack(codec, type, bytes, values.mutable_data_ptr(), out.numel(), on.stream());
  if (!out.is_contiguous()) torch::stable::copy_(out, values);
}

void copy_in(std::vector<Tensor> sources, std::vector<Tensor> targets) {
  if (sources.size() != targets.size()) {
    checks::fail("spu::copy_in_: ", sources.size(), " sources for ", targets.size(), " targets");
  }
  if (targets.empty()) return;
  std::vector<Copy> copies;
  for (size_t i = 0; i < targets.size(); ++i) {
    const Tensor &source = sources[i], &target = targets[i];
    expect_device("copy_in_", "target", target, targets[0]);
    checks::expect_same_shape("copy_in_", "source", source, "target", target);
    if (!target.is_contiguous()) checks::fail("spu::copy_in_: target ", i, " is not contiguous");
    copies.push_back({device_address("copy_in_", "source", source, targets[0]), target.mutable_data_ptr(),
                      storage_type("copy_in_", "source", source), storage_type("copy_in_", "target", target),
                      target.numel()});
  }
  const OnDevice on(targets[0]);
  launch_copies(copies, on.stream());
}

}  // namespace spu::cuda
