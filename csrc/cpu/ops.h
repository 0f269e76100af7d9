// The ops of the CPU library, registered in module.cpp: the shared ones, and those that it alone has.
#pragma once

#define SPU_LIBRARY cpu
#include "torch/ops.h"

namespace spu::cpu {

// Products that share x, in turn: y_i = x weights_i^T + biases_i (none, or one each); main_grads_i (+)= inv_scale
// dzs_i^T x.
std::vector<Tensor> linear_each(Tensor x, std::vector<Tensor> weights, std::vector<Tensor> biases);
// y = addend + (x weight^T + bias, rounded to x's dtype); the addend in x's dtype or fp32, as then y is.
Tensor linear_add(Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor addend);
void linear_dw_each(std::vector<Tensor> dzs, Tensor x, std::vector<Tensor> main_grads, Tensor inv_scale,
                    Tensor found_inf, bool accumulate);

std::tuple<Tensor, Tensor, Tensor> gated_mlp(Tensor x, Tensor w_gate, Tensor w_up, Tensor w_down, Text activation,
                                             bool keep);
std::tuple<Tensor, Tensor, Tensor> gated_mlp_add(Tensor x, Tensor w_gate, Tensor w_up, Tensor w_down, Text activation,
                                                 Tensor addend);
std::tuple<Tensor, Tensor, Tensor> gated_dh(Tensor dy, Tensor w_down, Tensor gate, Tensor up, Text activation);
Tensor gated_dx(Tensor dgate, Tensor dup, Tensor w_gate, Tensor w_up);

// A mixture of gated experts: rows one expert after the other, `ends` where each one's end; weights [experts, out, in],
// those of gate and up one below the other.
std::tuple<Tensor, Tensor, Tensor> experts_order(Tensor ids, int64_t experts);
std::tuple<Tensor, Tensor, Tensor> experts_mlp(Tensor x, Tensor ends, Tensor w_gate_up, Tensor w_down, Text activation,
                                               bool keep);
std::tuple<Tensor, Tensor, Tensor> experts_dh(Tensor dy, Tensor ends, Tensor w_down, Tensor gate, Tensor up,
                                              Text activation);
Tensor experts_dx(Tensor dgate, Tensor dup, Tensor ends, Tensor w_gate_up);
Tensor experts_dw(std::vector<Tensor> dzs, Tensor x, Tensor ends);
void experts_dw_sink(std::vector<Tensor> dzs, Tensor x, Tensor ends, Tensor main_grad, Tensor inv_scale,
                     Tensor found_inf, bool accumulate);
// Sums of the rows that places [count, terms] name, by factors; products a_i b_places_ij.
Tensor rows_sum(Tensor rows, Tensor places, std::optional<Tensor> factors, torch::headeronly::ScalarType dtype);
Tensor rows_dot(Tensor a, Tensor b, Tensor places);

std::tuple<Tensor, Tensor, Tensor> mlp_dz(Tensor dy, Tensor w_out, Tensor saved, Text activation, bool needs_h,
                                          bool needs_sums);

std::tuple<Tensor, Tensor> linear_ce(Tensor hidden, Tensor weight, Tensor target, int64_t ignore_index);
Tensor linear_ce_and_dz_into(Tensor hidden, Tensor weight, Tensor target, Tensor grad_rows, Tensor logits, Tensor dz,
                             int64_t ignore_index);
Tensor linear_ce_dz(Tensor hidden, Tensor weight, Tensor target, Tensor lse, Tensor grad_rows, int64_t ignore_index);

std::tuple<Tensor, Tensor> attention(Tensor q, Tensor k, Tensor v, double scale, bool causal);
std::tuple<Tensor, Tensor, Tensor> attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,
                                                      double scale, bool causal);

std::tuple<Tensor, Tensor, Tensor> rms_norm(Tensor x, std::optional<Tensor> residual, std::optional<Tensor> weight,
                                            double eps, double offset, bool rounded);
// y in another type than x: fp32 rows to 16 bits.
std::tuple<Tensor, Tensor> rms_norm_to(Tensor x, std::optional<Tensor> weight, double eps, double offset, bool rounded,
                                       torch::headeronly::ScalarType dtype);
std::tuple<Tensor, Tensor> rms_norm_backward(Tensor dy, std::optional<Tensor> dsum, Tensor x,
                                             std::optional<Tensor> weight, Tensor rstd, double offset, bool rounded,
                                             bool needs_dx, bool needs_dw);
std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm(Tensor x, std::optional<Tensor> residual,
                                                      std::optional<Tensor> weight, std::optional<Tensor> bias,
                                                      double eps);
std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(Tensor dy, std::optional<Tensor> dsum, Tensor x,
                                                       std::optional<Tensor> weight, Tensor mean, Tensor rstd,
                                                       bool needs_dx, bool needs_dw, bool needs_db);

void copy_in(std::vector<Tensor> sources, std::vector<Tensor> targets);

void embedding_dw_sink(Tensor dy, Tensor ids, int64_t padding_idx, Tensor main_grad, Tensor inv_scale, Tensor found_inf,
                       bool accumulate);
// Heads first: q and k [batch, heads, tokens, head_dim].
std::tuple<Tensor, Tensor> rotary(Tensor q, Tensor k, Tensor cos, Tensor sin, bool interleaved, bool inverse);

}  // namespace spu::cpu
