// CRC-32C by tables, eight bytes a round, and by SSE4.2's instruction.
//
// The instruction takes 8 bytes and has a latency of three cycles, but one can start each cycle: three blocks that lie
// side by side are summed at once, and joined. A sum is linear, so joining needs only what a first sum becomes when
// kBlock zero bytes follow it; that is a matrix of 32 x 32 bits, kept as four tables of 256 words.
#include "crc32c.h"

#include <array>
#include <cstring>

namespace spu::host {
namespace {

constexpr std::uint32_t kPolynomial = 0x82f63b78;  // Castagnoli's, lowest bit first
constexpr std::size_t kBlock = 4096;               // bytes of each of the three blocks

using Table = std::array<std::uint32_t, 256>;

struct Tables {
  std::array<Table, 8> slices;  // [k][b]: what the byte b becomes when k zero bytes follow it
  std::array<Table, 4> shift;   // [k][b]: what byte k of a sum becomes when kBlock zero bytes follow the sum

  Tables() {
    for (std::uint32_t b = 0; b < 256; ++b) {
      std::uint32_t sum = b;
      for (int bit = 0; bit < 8; ++bit) sum = (sum >> 1) ^ ((sum & 1) != 0 ? kPolynomial : 0);
      slices[0][b] = sum;
    }
    for (std::size_t k = 1; k < 8; ++k) {
      for (std::size_t b = 0; b < 256; ++b) slices[k][b] = followed_by_zero(slices[k - 1][b]);
    }
    for (std::size_t k = 0; k < 4; ++k) {
      for (std::uint32_t b = 0; b < 256; ++b) {
        std::uint32_t sum = b << (8 * k);
        for (std::size_t zeros = 0; zeros < kBlock; ++zeros) sum = followed_by_zero(sum);
        shift[k][b] = sum;
      }
    }
  }

  std::uint32_t followed_by_zero(std::uint32_t sum) const { return slices[0][sum & 0xff] ^ (sum >> 8); }

  std::uint32_t followed_by_block(std::uint32_t sum) const {
    return shift[0][sum & 0xff] ^ shift[1][(sum >> 8) & 0xff] ^ shift[2][(sum >> 16) & 0xff] ^ shift[3][sum >> 24];
  }
};

const Tables& tables() {
  static const Tables made;
  return made;
}

std::uint64_t load(const unsigned char* data) {
  std::uint64_t word;
  std::memcpy(&word, data, sizeof word);
  return word;
}

std::uint32_t by_tables(const unsigned char* data, std::size_t count, std::uint32_t sum) {
  const Tables& t = tables();
  for (; count >= 8; data += 8, count -= 8) {
    std::uint32_t next = 0;
    for (std::size_t k = 0; k < 8; ++k) {
      const std::uint32_t byte = data[k] ^ (k < 4 ? (sum >> (8 * k)) & 0xff : 0);
      next ^= t.slices[7 - k][byte];
    }
    sum = next;
  }
  for (; count > 0; ++data, --count) sum = t.followed_by_zero(sum ^ *data);
  return sum;
}

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define SPU_HAS_CRC32C_INSTRUCTION 1

__attribute__((target("sse4.2"))) std::uint64_t step(std::uint64_t sum, const unsigned char* data) {
  return __builtin_ia32_crc32di(sum, load(data));
}

__attribute__((target("sse4.2"))) std::uint32_t by_instruction(const unsigned char* data, std::size_t count,
                                                               std::uint32_t before) {
  const Tables& t = tables();
  std::uint64_t sum = before;
  for (; count >= 3 * kBlock; data += 3 * kBlock, count -= 3 * kBlock) {
    std::uint64_t second = 0, third = 0;
    for (std::size_t k = 0; k < kBlock; k += 8) {
      sum = step(sum, data + k);
      second = step(second, data + kBlock + k);
      third = step(third, data + 2 * kBlock + k);
    }
    sum = t.followed_by_block(static_cast<std::uint32_t>(sum)) ^ second;
    sum = t.followed_by_block(static_cast<std::uint32_t>(sum)) ^ third;
  }
  for (; count >= 8; data += 8, count -= 8) sum = step(sum, data);
  return by_tables(data, count, static_cast<std::uint32_t>(sum));
}
#endif

}  // namespace

std::uint32_t crc32c_by_tables(const unsigned char* data, std::size_t count, std::uint32_t before) {
  return ~by_tables(data, count, ~before);
}

std::uint32_t crc32c(const unsigned char* data, std::size_t count, std::uint32_t before) {
#ifdef SPU_HAS_CRC32C_INSTRUCTION
  static const bool has_instruction = __builtin_cpu_supports("sse4.2") != 0;
  if (has_instruction) return ~by_instruction(data, count, ~before);
#endif
  return crc32c_by_tables(data, count, before);
}

}  // namespace spu::host
