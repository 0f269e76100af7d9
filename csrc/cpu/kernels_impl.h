// The kernels of one instruction set and their table. The including .cpp file defines SPU_ISA_NS, SPU_ISA_NAME,
// SPU_LANES, SPU_MR, SPU_NV and, with wider instructions, SPU_VEC_AVX2 or SPU_VEC_AVX512.
#pragma once

#include "cpu/attention_kernels.h"
#include "cpu/codec_kernels.h"
#include "cpu/codec_small.h"
#include "cpu/gated_kernels.h"
#include "cpu/gemm.h"
#include "cpu/norm_kernels.h"
#include "cpu/optim_kernels.h"
#include "cpu/pointwise.h"
#include "cpu/row_kernels.h"
#include "cpu/softmax_kernels.h"

namespace spu::SPU_ISA_NS {

static const cpu::KernelTable kTable = {gemm,           finish,       attention, attention_backward, act_backward,
                                        gated_backward, column_sums,  norm,      norm_backward,      sum_rows,
                                        rotary,         unscale,      convert,   int8_encode,        int8_decode,
                                        small_encode,   small_decode, adamw,     square_sum,         add,
                                        cross_entropy,  SPU_ISA_NAME};

}  // namespace spu::SPU_ISA_NS
