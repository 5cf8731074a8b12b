// Memory for large results, used again once nobody holds it any more.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <iterator>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

namespace nft {

// The C structures of DLPack (https://dmlc.github.io/dlpack), as which torch takes memory over.
namespace dlpack {

constexpr int32_t kCpu = 1;
constexpr uint8_t kFloat = 2, kBfloat = 4;

struct Device {
  int32_t type, id;
};

struct DataType {
  uint8_t code, bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  int32_t dims;
  DataType dtype;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};

struct ManagedTensor {
  Tensor tensor;
  void* context;
  void (*deleter)(ManagedTensor*);
};

}  // namespace dlpack

class Memory {
 public:
  // Never destroyed: tensors may outlive all that is.
  static Memory& instance() {
    static Memory* memory = new Memory;
    return *memory;
  }

  void* take(size_t size) {
    const std::lock_guard lock(mutex_);
    void* block = nullptr;
    // The newest is the likeliest to be in a cache.
    for (auto found = free_.rbegin(); found != free_.rend() && !block; ++found)
      if (found->second == size) {
        block = found->first;
        free_.erase(std::next(found).base());
        kept_ -= size;
        break;
      }
    if (!block) block = fresh(size);
    if (!block) {
      release_all();
      block = fresh(size);
    }
    if (!block) throw std::bad_alloc();
    lent_ += size;
    return block;
  }

  void give_back(void* block, size_t size) {
    const std::lock_guard lock(mutex_);
    lent_ -= size;
    kept_ += size;
    free_.emplace_back(block, size);
    while (kept_ > kMost) release_oldest();
  }

  void release() {
    const std::lock_guard lock(mutex_);
    release_all();
  }

  // Bytes in use, and bytes kept for later.
  std::pair<size_t, size_t> sizes() {
    const std::lock_guard lock(mutex_);
    return {lent_, kept_};
  }

 private:
  static constexpr size_t kMost = size_t(256) << 20, kAlignment = 64;

  static void* fresh(size_t size) {
    return std::aligned_alloc(kAlignment, (size + kAlignment - 1) / kAlignment * kAlignment);
  }

  void release_oldest() {
    std::free(free_.front().first);
    kept_ -= free_.front().second;
    free_.erase(free_.begin());
  }

  void release_all() {
    while (!free_.empty()) release_oldest();
  }

  std::mutex mutex_;
  std::vector<std::pair<void*, size_t>> free_;  // the oldest first
  size_t kept_ = 0, lent_ = 0;
};

// A dense tensor of such memory, which goes back when its deleter is called.
struct Lent {
  dlpack::ManagedTensor managed;
  std::vector<int64_t> shape, strides;
  size_t size;

  Lent(std::vector<int64_t> sizes, dlpack::DataType dtype) : shape(std::move(sizes)), strides(shape.size()) {
    int64_t elements = 1;
    for (size_t d = shape.size(); d-- > 0; elements *= shape[d]) strides[d] = elements;
    size = static_cast<size_t>(elements) * dtype.bits / 8;
    void* data = Memory::instance().take(size);
    const auto dims = static_cast<int32_t>(shape.size());
    managed = {{data, {dlpack::kCpu, 0}, dims, dtype, shape.data(), strides.data(), 0}, this, [](auto* tensor) {
                 delete static_cast<Lent*>(tensor->context);
               }};
  }

  ~Lent() { Memory::instance().give_back(managed.tensor.data, size); }
};

}  // namespace nft
