#include "scratch.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <vector>

namespace lora::cuda {

class Block {
 public:
  std::mutex mutex;

  ~Block() {
    for (void* part : parts_) cudaFree(part);
  }

  float* at_least(size_t bytes) {
    if (bytes <= size_) return static_cast<float*>(parts_.back());
    const size_t size = std::max({bytes, 2 * size_, size_t{1} << 20});
    // A capture forbids allocation unless this thread says that it knows what it does: the memory
    // is no part of the graph.
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    cudaThreadExchangeStreamCaptureMode(&mode);
    void* part = nullptr;
    const bool made = cudaMalloc(&part, size) == cudaSuccess;
    cudaThreadExchangeStreamCaptureMode(&mode);
    if (!made) {
      cudaGetLastError();  // it must not show up as the next launch's
      return nullptr;
    }
    parts_.push_back(part);
    size_ = size;
    return static_cast<float*>(part);
  }

 private:
  std::vector<void*> parts_;
  size_t size_ = 0;
};

Scratch::Lease Scratch::lease(void* stream, size_t bytes) {
  using Key = std::pair<int, void*>;
  static std::mutex mutex;
  static std::map<Key, std::weak_ptr<Block>> all;
  Key key{0, stream};
  cudaGetDevice(&key.first);
  std::shared_ptr<Block> block;
  {
    const std::scoped_lock both(mutex, mutex_);
    block = blocks_[key];
    if (block == nullptr) {
      std::weak_ptr<Block>& shared = all[key];
      block = shared.lock();
      if (block == nullptr) shared = block = std::make_shared<Block>();
      blocks_[key] = block;
    }
  }
  std::unique_lock<std::mutex> held(block->mutex);
  return {block->at_least(bytes), std::move(held)};
}

}  // namespace lora::cuda
