#include "transfer.h"

#include <unistd.h>

#include <cerrno>

#include "crc32c.h"

namespace spu::host {
namespace {

constexpr int kTries = 16;  // calls in a row that move less than a block and say no error

// Repeats `call`, which moves what it can from byte `done` on and returns how much, until all is moved.
template <class Call>
Transfer move_all(std::size_t count, std::size_t block, const Call& call) {
  std::size_t done = 0;
  for (int tries = 0; done < count && tries < kTries;) {
    const ssize_t moved = call(done);
    if (moved < 0) {
      if (errno == EINTR) continue;
      return {done, errno, 0};
    }
    std::size_t step = static_cast<std::size_t>(moved);
    if (done + step < count) step -= step % block;
    tries = step == 0 ? tries + 1 : 0;
    done += step;
  }
  return {done, 0, 0};
}

}  // namespace

Transfer read_at(int fd, unsigned char* data, std::size_t count, std::int64_t at, std::size_t block) {
  Transfer found = move_all(count, block, [=](std::size_t done) {
    return pread(fd, data + done, count - done, static_cast<off_t>(at + static_cast<std::int64_t>(done)));
  });
  if (found.done == count) found.sum = crc32c(data, count, 0);
  return found;
}

Transfer write_at(int fd, const unsigned char* data, std::size_t count, std::int64_t at, std::size_t block) {
  Transfer found = move_all(count, block, [=](std::size_t done) {
    return pwrite(fd, data + done, count - done, static_cast<off_t>(at + static_cast<std::int64_t>(done)));
  });
  if (found.done == count) found.sum = crc32c(data, count, 0);
  return found;
}

}  // namespace spu::host
