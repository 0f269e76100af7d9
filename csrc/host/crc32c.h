// CRC-32C (Castagnoli; RFC 3720 appendix B.4): the checksum of what a store writes to a disk.
#pragma once

#include <cstddef>
#include <cstdint>

namespace spu::host {

// The CRC-32C of bytes that follow others whose CRC-32C is `before` (0 for none). The processor's instruction where it
// has one (SSE4.2), tables elsewhere: the same value.
std::uint32_t crc32c(const unsigned char* data, std::size_t count, std::uint32_t before);

// The same, always by tables.
std::uint32_t crc32c_by_tables(const unsigned char* data, std::size_t count, std::uint32_t before);

}  // namespace spu::host
