// Device memory for the sums of the shrink: one growing block for each stream, for all sites.
//
// onnxruntime's own KernelContext_GetScratchBuffer takes from the arena and never gives back. Work
// on one stream is in order, so all sites can share a block; it is held while launches are queued,
// so that no other thread's launches on the same stream come between. What a captured graph holds
// stays where it is: a block that grows keeps its older parts until its last kernel is destroyed.
#pragma once

#include <cstddef>
#include <map>
#include <memory>
#include <mutex>
#include <utility>

namespace lora::cuda {

class Block;

class Scratch {
 public:
  struct Lease {
    float* memory;  // null: there is no memory
    std::unique_lock<std::mutex> held;
  };
  Lease lease(void* stream, size_t bytes);

 private:
  std::mutex mutex_;
  std::map<std::pair<int, void*>, std::shared_ptr<Block>> blocks_;  // of device and stream
};

}  // namespace lora::cuda
