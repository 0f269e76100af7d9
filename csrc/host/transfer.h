// A piece of a file read or written whole, with its checksum, in one go: a thread of a store asks for the
// interpreter's lock once a piece, and not after each system call and each sum.
#pragma once

#include <cstddef>
#include <cstdint>

namespace spu::host {

struct Transfer {
  std::size_t done;   // bytes moved; fewer than asked with error 0: the file gives or takes no more
  int error;          // errno of the call that failed, else 0
  std::uint32_t sum;  // CRC-32C of the bytes, when all were moved
};

// Reads `count` bytes at `at` into `data`. A call may move any part of them: the next one starts at a multiple of
// `block` bytes from there, as direct I/O needs; 1 for the page cache. Interrupted calls are repeated.
Transfer read_at(int fd, unsigned char* data, std::size_t count, std::int64_t at, std::size_t block);

// Writes them likewise.
Transfer write_at(int fd, const unsigned char* data, std::size_t count, std::int64_t at, std::size_t block);

}  // namespace spu::host
