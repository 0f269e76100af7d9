// Packed sides that the products of one call share: q, k and v have one x. Included in the namespace of an instruction
// set.
#pragma once

#include "cpu/kernels.h"
#include "cpu/vec.h"

namespace spu::SPU_ISA_NS {

// One whole side of a product of the thread as it was packed for a call, all of it finite; uses: of its slot, when that
// was done.
struct PackedSide {
  int64_t call;
  const void* data;
  Type type;
  int64_t row, col, length, k, uses;
  uint16_t* panels;
};

SPU_INLINE PackedSide& packed_side(int slot) {
  static thread_local PackedSide sides[2];
  return sides[slot == cpu::kSharedA ? 0 : 1];
}

// Its panels, if it is this operand, of `length` rows (columns of B) by k, packed in the same call (an earlier call's
// may have changed), and nothing else has used the slot since.
SPU_INLINE uint16_t* panels_of(int slot, int64_t call, const cpu::Operand& x, int64_t length, int64_t k) {
  const PackedSide& s = packed_side(slot);
  const bool same = call && s.call == call && s.data == x.data && s.type == x.type && s.row == x.row && s.col == x.col;
  return same && s.length == length && s.k == k && s.uses == cpu::workspace_uses(slot) ? s.panels : nullptr;
}

SPU_INLINE void keep_panels(int slot, int64_t call, const cpu::Operand& x, int64_t length, int64_t k,
                            uint16_t* panels) {
  packed_side(slot) = {call, x.data, x.type, x.row, x.col, length, k, cpu::workspace_uses(slot), panels};
}

}  // namespace spu::SPU_ISA_NS
