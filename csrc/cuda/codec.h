// Packing a tensor into a wire (math/wire.h) and back, on the device.
#pragma once

#include <stdint.h>

#include "cuda/device.h"
#include "cuda/types.h"
#include "math/wire.h"

namespace spu::cuda {

// Writes the whole wire: header, scales, payload, and zeros in the padding. `wire` may be pinned host memory, which
// the device then fills by stores over the link, without a copy of its own.
void launch_pack(wire::Codec codec, Type type, const void* x, const wire::Header& header, uint8_t* wire,
                 cudaStream_t stream);

// Reads numel values out of a wire, which may lie in pinned host memory.
void launch_unpack(wire::Codec codec, Type type, const uint8_t* wire, void* x, int64_t numel, cudaStream_t stream);

}  // namespace spu::cuda
