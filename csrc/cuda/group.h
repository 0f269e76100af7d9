// One launch for a list of tensors: the list is a kernel parameter, and each block works on a piece of one tensor.
#pragma once

#include <stdint.h>

#include <vector>

#include "cuda/vector.h"

namespace spu::cuda {

constexpr int kGroup = 48;         // tensors of a launch: what fits into the 4 KB of a kernel's parameters
constexpr int64_t kPiece = 16384;  // values that one block works on

// A list of tensors as a kernel parameter. Tensor t owns blocks first[t] .. first[t + 1), one for each of its pieces.
template <class Item>
struct Group {
  Item item[kGroup];
  int first[kGroup + 1];
  int count;
};

inline int pieces_of(int64_t numel) {
  return static_cast<int>((numel + kPiece - 1) / kPiece);
}

// Calls f(group) for each group of a list; empty tensors are left out.
template <class Item, class F>
void for_groups(const std::vector<Item>& items, F f) {
  Group<Item> group = {};
  for (const Item& item : items) {
    if (item.numel == 0) continue;
    group.item[group.count] = item;
    group.first[group.count + 1] = group.first[group.count] + pieces_of(item.numel);
    if (++group.count == kGroup) {
      f(group);
      group = {};
    }
  }
  if (group.count > 0) f(group);
}

// The tensor that this block works on.
template <class Item>
SPU_DEVICE int tensor_of_block(const Group<Item>& group) {
  int low = 0, high = group.count;  // first[low] <= block < first[high]
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (group.first[middle] <= static_cast<int>(blockIdx.x)) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

}  // namespace spu::cuda
