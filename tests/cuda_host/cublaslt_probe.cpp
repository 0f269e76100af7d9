// Says which cuBLASLt csrc/cuda finds after the library that the first argument names was loaded.
#include <dlfcn.h>
#include <stdio.h>

#include "cuda/cublaslt.h"

int main(int count, char** arguments) {
  if (count > 1 && dlopen(arguments[1], RTLD_NOW) == nullptr) {
    fprintf(stderr, "%s\n", dlerror());
    return 1;
  }
  const spu::cuda::lt::Library* library = spu::cuda::lt::cublaslt();
  if (library == nullptr) {
    printf("absent: %s\n", spu::cuda::lt::absent().c_str());
  } else {
    printf("version %zu\n", library->version());
  }
  return 0;
}
