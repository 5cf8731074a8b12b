#pragma once
#include "cuda_runtime.h"

namespace cooperative_groups {

struct cluster_group {
  unsigned num_blocks() const { return static_cast<unsigned>(emulator::block->cluster->origins.size()); }
  unsigned block_rank() const { return emulator::block->rank; }
  void barrier_arrive() const {
    ++emulator::block->arrivals[threadIdx.x];
    ++emulator::block->cluster->arrivals;
  }
  // Nobody arrives again before all have arrived as often.
  void barrier_wait() const {
    const uint64_t all = emulator::block->arrivals[threadIdx.x] * blockDim.x * num_blocks();
    while (emulator::block->cluster->arrivals < all) {
      emulator::block->waits_for_others = true;
      emulator::yield();
    }
  }
  void sync() const {
    barrier_arrive();
    barrier_wait();
  }
  template <typename T>
  T* map_shared_rank(T* mine, int rank) const {
    const ptrdiff_t offset = reinterpret_cast<char*>(mine) - &emulator::origin;
    return reinterpret_cast<T*>(emulator::block->cluster->origins[rank] + offset);
  }
};

inline cluster_group this_cluster() { return {}; }

// The blocks that run at once are all of the grid's.
struct grid_group {
  int barrier_arrive() const {
    this_cluster().barrier_arrive();
    return 0;
  }
  void barrier_wait(int&&) const { this_cluster().barrier_wait(); }
};

inline grid_group this_grid() { return {}; }

}  // namespace cooperative_groups

inline void __cluster_barrier_arrive_relaxed() { cooperative_groups::this_cluster().barrier_arrive(); }
