// A stand-in for cuBLASLt: checks and records what it is asked for, and multiplies on the CPU. Its numbers are written
// out after NVIDIA's documentation, not taken from csrc/cuda/cublaslt.h, which they test.
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <map>
#include <string>
#include <vector>

#include "math/half.h"

namespace {

constexpr int kSuccess = 0, kInvalid = 7;
constexpr uint64_t kToken = 0x5eed;

struct Desc {
  int compute, scale;
  std::map<int, std::vector<char>> set;

  template <class T>
  T get(int attribute, T otherwise) const {
    const auto found = set.find(attribute);
    if (found == set.end()) return otherwise;
    T value;
    memcpy(&value, found->second.data(), sizeof(value));
    return value;
  }
};
struct Layout {
  int type;
  uint64_t rows, cols;
  int64_t ld;
};
struct Result {
  uint64_t algorithm[8];
  size_t workspace;
  int state;
  float waves;
  int reserved[4];
};

std::string calls;
// What the next searches and products answer.
int heuristic_status = 0, heuristic_count = 1, first_state = 0, matmul_status = 0;
size_t workspace_bytes = 0;

float load(const Layout& at, const void* p, uint64_t i) {
  if (at.type == 0) return static_cast<const float*>(p)[i];
  const uint32_t h = static_cast<const uint16_t*>(p)[i];
  return at.type == 2 ? spu::math::fp16_to_float<float>(h) : spu::math::bf16_to_float<float>(h);
}

void store(int type, void* p, uint64_t i, float x) {
  if (type == 0) {
    static_cast<float*>(p)[i] = x;
  } else {
    const uint32_t h = type == 2 ? spu::math::float_to_fp16<float>(x) : spu::math::float_to_bf16<float>(x);
    static_cast<uint16_t*>(p)[i] = static_cast<uint16_t>(h);
  }
}

float gelu_tanh(float z) {
  return static_cast<float>(0.5 * z * (1 + tanh(sqrt(2 / M_PI) * (z + 0.044715 * pow(z, 3)))));
}

float gelu_tanh_gradient(float z) {
  const double u = tanh(sqrt(2 / M_PI) * (z + 0.044715 * pow(z, 3)));
  return static_cast<float>(0.5 * (1 + u) + 0.5 * z * (1 - u * u) * sqrt(2 / M_PI) * (1 + 3 * 0.044715 * z * z));
}

bool fits(const Layout& at) {
  return at.ld >= static_cast<int64_t>(at.rows) && (at.type == 0 || at.type == 2 || at.type == 14);
}

void record(const char* call, const Desc& desc, const Layout& a, const Layout& b, const Layout& d) {
  char line[512];
  const bool ta = desc.get<int32_t>(3, 0) != 0;
  snprintf(line, sizeof line,
           "{\"call\": \"%s\", \"types\": [%d, %d, %d], \"shape\": [%llu, %llu, %llu], \"lds\": [%lld, %lld, %lld], "
           "\"transposed\": [%d, %d], \"epilogue\": %u, \"on_device\": %d, \"bias\": %d, \"aux_ld\": %lld",
           call, a.type, b.type, d.type, static_cast<unsigned long long>(d.rows),
           static_cast<unsigned long long>(d.cols), static_cast<unsigned long long>(ta ? a.rows : a.cols),
           static_cast<long long>(a.ld), static_cast<long long>(b.ld), static_cast<long long>(d.ld), ta,
           desc.get<int32_t>(4, 0), desc.get<uint32_t>(7, 1), desc.get<int32_t>(2, 0),
           desc.get<const void*>(8, nullptr) != nullptr, static_cast<long long>(desc.get<int64_t>(12, 0)));
  calls += line;
}

}  // namespace

extern "C" {

const char* stub_calls() {
  return calls.c_str();
}
void stub_clear() {
  calls.clear();
  heuristic_status = first_state = matmul_status = 0;
  heuristic_count = 1;
  workspace_bytes = 0;
}
void stub_answer(int status, int count, int state, size_t workspace, int matmul) {
  heuristic_status = status;
  heuristic_count = count;
  first_state = state;
  workspace_bytes = workspace;
  matmul_status = matmul;
}

size_t cublasLtGetVersion() {
  const char* told = getenv("STUB_VERSION");
  return told != nullptr ? strtoull(told, nullptr, 10) : 130100;
}
const char* cublasLtGetStatusName(int status) {
  return status == kInvalid ? "CUBLAS_STATUS_INVALID_VALUE" : "CUBLAS_STATUS_OTHER";
}
int cublasLtCreate(void** handle) {
  *handle = &calls;
  return kSuccess;
}

int cublasLtMatmulDescCreate(Desc** made, int compute, int scale) {
  *made = new Desc{compute, scale, {}};
  return kSuccess;
}
int cublasLtMatmulDescSetAttribute(Desc* desc, int attribute, const void* value, size_t bytes) {
  static const std::map<int, size_t> sizes = {{2, 4}, {3, 4}, {4, 4}, {7, 4}, {8, 8}, {11, 8}, {12, 8}};
  const auto size = sizes.find(attribute);
  if (size == sizes.end() || size->second != bytes) return kInvalid;
  const char* from = static_cast<const char*>(value);
  desc->set[attribute].assign(from, from + bytes);
  return kSuccess;
}
int cublasLtMatmulDescDestroy(Desc* desc) {
  delete desc;
  return kSuccess;
}

int cublasLtMatrixLayoutCreate(Layout** made, int type, uint64_t rows, uint64_t cols, int64_t ld) {
  *made = new Layout{type, rows, cols, ld};
  return fits(**made) ? kSuccess : kInvalid;
}
int cublasLtMatrixLayoutDestroy(Layout* layout) {
  delete layout;
  return kSuccess;
}

int cublasLtMatmulPreferenceCreate(Desc** made) {
  *made = new Desc{};
  return kSuccess;
}
int cublasLtMatmulPreferenceSetAttribute(Desc* preference, int attribute, const void* value, size_t bytes) {
  if (bytes != (attribute == 1 ? 8u : 4u) || attribute > 8) return kInvalid;
  const char* from = static_cast<const char*>(value);
  preference->set[attribute].assign(from, from + bytes);
  return kSuccess;
}
int cublasLtMatmulPreferenceDestroy(Desc* preference) {
  delete preference;
  return kSuccess;
}

int cublasLtMatmulAlgoGetHeuristic(void* handle, Desc* desc, Layout* a, Layout* b, Layout* c, Layout* d,
                                   Desc* preference, int wanted, Result* found, int* count) {
  if (handle != &calls || c->type != d->type || wanted < 2) return kInvalid;
  record("heuristic", *desc, *a, *b, *d);
  char line[160];
  snprintf(line, sizeof line, ", \"workspace\": %llu, \"schemes\": %u, \"aligned\": [%u, %u, %u, %u]}\n",
           static_cast<unsigned long long>(preference->get<uint64_t>(1, 0)), preference->get<uint32_t>(3, 7),
           preference->get<uint32_t>(5, 256), preference->get<uint32_t>(6, 256), preference->get<uint32_t>(7, 256),
           preference->get<uint32_t>(8, 256));
  calls += line;
  if (heuristic_status != kSuccess) return heuristic_status;
  *count = heuristic_count;
  for (int i = 0; i < heuristic_count; ++i) {
    found[i] = Result{{kToken + static_cast<uint64_t>(i)}, workspace_bytes, i == 0 ? first_state : kSuccess, 1.0f, {}};
  }
  return kSuccess;
}

int cublasLtMatmul(void* handle, Desc* desc, const float* alpha, const void* a, Layout* la, const void* b, Layout* lb,
                   const float* beta, const void* c, Layout* lc, void* d, Layout* ld, const uint64_t* algorithm,
                   void* workspace, size_t bytes, void*) {
  if (handle != &calls || desc->compute != 68 || desc->scale != 0 || *algorithm < kToken) return kInvalid;
  if (bytes != workspace_bytes || (bytes > 0) != (workspace != nullptr)) return kInvalid;
  record("multiply", *desc, *la, *lb, *ld);
  calls += ", \"alpha\": " + std::to_string(*alpha) + ", \"beta\": " + std::to_string(*beta) +
           ", \"algorithm\": " + std::to_string(*algorithm - kToken) + "}\n";
  if (matmul_status != kSuccess) return matmul_status;
  if (bytes > 0) memset(workspace, 0xab, bytes);
  const bool ta = desc->get<int32_t>(3, 0) != 0, tb = desc->get<int32_t>(4, 0) != 0;
  const uint64_t inner = ta ? la->rows : la->cols;
  if ((ta ? la->cols : la->rows) != ld->rows || (tb ? lb->rows : lb->cols) != ld->cols ||
      (tb ? lb->cols : lb->rows) != inner || lc->ld != ld->ld) {
    return kInvalid;
  }
  const uint32_t epilogue = desc->get<uint32_t>(7, 1);
  const void* bias = desc->get<const void*>(8, nullptr);
  void* aux = desc->get<void*>(11, nullptr);
  if (((epilogue & 4) != 0 && bias == nullptr) || ((epilogue & 128) != 0 && aux == nullptr)) return kInvalid;
  for (uint64_t j = 0; j < ld->cols; ++j) {
    for (uint64_t i = 0; i < ld->rows; ++i) {
      float sum = 0;
      for (uint64_t l = 0; l < inner; ++l) {
        const float x = load(*la, a, ta ? l + i * la->ld : i + l * la->ld);
        sum += x * load(*lb, b, tb ? j + l * lb->ld : l + j * lb->ld);
      }
      float value = *alpha * sum;
      if (*beta != 0) value += *beta * load(*lc, c, i + j * lc->ld);
      if ((epilogue & 4) != 0) value += load(*ld, bias, i);
      const uint64_t in_aux = i + j * desc->get<int64_t>(12, 0);
      if (epilogue == 192) value *= gelu_tanh_gradient(load(*ld, aux, in_aux));  // aux is read, or written
      if (epilogue == 160 || epilogue == 164) store(ld->type, aux, in_aux, value);
      if ((epilogue & 32) != 0) value = gelu_tanh(value);
      store(ld->type, d, i + j * ld->ld, value);
    }
  }
  return kSuccess;
}

}  // extern "C"
