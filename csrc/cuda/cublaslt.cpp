// Finds cuBLASLt in the process.
#include "cuda/cublaslt.h"

#include <dlfcn.h>
#include <link.h>

#include <cstring>

namespace spu::cuda {
namespace lt {
namespace {

constexpr const char* kStem = "libcublasLt.so";
constexpr size_t kOldest = 12, kNewest = 13;  // major versions whose interface is the one declared here

// dl_iterate_phdr's visitor: the path of a loaded library whose file is cuBLASLt's.
int remember(dl_phdr_info* info, size_t, void* path) {
  const char* name = info->dlpi_name != nullptr ? std::strrchr(info->dlpi_name, '/') : nullptr;
  if (name == nullptr || std::strncmp(name + 1, kStem, std::strlen(kStem)) != 0) return 0;
  *static_cast<std::string*>(path) = info->dlpi_name;
  return 1;
}

// The library that is in the process already, under its own name or another; torch with CUDA has loaded one. Nothing
// is loaded here: a second copy would keep kernels and workspaces of its own.
void* loaded() {
  for (size_t major = kNewest; major >= kOldest; --major) {
    const std::string name = std::string(kStem) + "." + std::to_string(major);
    if (void* found = dlopen(name.c_str(), RTLD_LAZY | RTLD_NOLOAD)) return found;
  }
  std::string path;
  dl_iterate_phdr(remember, &path);
  return path.empty() ? nullptr : dlopen(path.c_str(), RTLD_LAZY | RTLD_NOLOAD);
}

struct Found {
  Library library = {};
  std::string absent;

  template <class Function>
  void look_up(void* from, const char* name, Function* function) {
    *function = reinterpret_cast<Function>(dlsym(from, name));
    if (*function == nullptr && absent.empty()) absent = std::string("the loaded cuBLASLt has no ") + name;
  }

  Found() {
    void* from = loaded();
    if (from == nullptr) {
      absent = "no cuBLASLt is loaded; torch with CUDA loads one";
      return;
    }
    look_up(from, "cublasLtGetVersion", &library.version);
    look_up(from, "cublasLtGetStatusName", &library.status_name);
    look_up(from, "cublasLtCreate", &library.create);
    look_up(from, "cublasLtMatmulDescCreate", &library.description_create);
    look_up(from, "cublasLtMatmulDescSetAttribute", &library.description_set);
    look_up(from, "cublasLtMatmulDescDestroy", &library.description_destroy);
    look_up(from, "cublasLtMatrixLayoutCreate", &library.layout_create);
    look_up(from, "cublasLtMatrixLayoutDestroy", &library.layout_destroy);
    look_up(from, "cublasLtMatmulPreferenceCreate", &library.preference_create);
    look_up(from, "cublasLtMatmulPreferenceSetAttribute", &library.preference_set);
    look_up(from, "cublasLtMatmulPreferenceDestroy", &library.preference_destroy);
    look_up(from, "cublasLtMatmulAlgoGetHeuristic", &library.heuristic);
    look_up(from, "cublasLtMatmul", &library.multiply);
    if (!absent.empty()) return;
    const size_t version = library.version(), major = version / 10000;
    if (major < kOldest || major > kNewest) {
      absent = "the loaded cuBLASLt has version " + std::to_string(version) + "; spu knows " + std::to_string(kOldest) +
               " to " + std::to_string(kNewest);
    }
  }
};

const Found& found() {
  static const Found once;
  return once;
}

}  // namespace

const Library* cublaslt() {
  return found().absent.empty() ? &found().library : nullptr;
}

const std::string& absent() {
  return found().absent;
}

}  // namespace lt
}  // namespace spu::cuda
