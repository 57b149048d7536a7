#include "body.h"
#include "device.cuh"

namespace pat::cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(kThreads, kMoveBlocks)
    move_kernel(const __grid_constant__ Lists lists, const Move* __restrict__ moves,
                const int32_t* __restrict__ index) {
  const Move m = moves[blockIdx.x];
  move_block(m, lists.at<const T>(1, m.from_tensor) + m.from_offset, lists.at<T>(0, m.to_tensor) + m.to_offset, index,
             static_cast<int>(threadIdx.x));
}

}  // namespace

void compact(const Call& call, const Move* moves, int64_t n_moves, int64_t element_bytes, const int32_t* index) {
  if (n_moves == 0) return;
  const Running running(call);
  const auto launch = [&](auto zero) {
    using T = decltype(zero);
    move_kernel<T><<<static_cast<unsigned>(n_moves), kThreads, 0, running.stream()>>>(running.lists(), moves, index);
  };
  if (element_bytes == 1) launch(uint8_t{});
  else if (element_bytes == 2) launch(uint16_t{});
  else if (element_bytes == 4) launch(uint32_t{});
  else launch(uint64_t{});
  check(cudaGetLastError(), "channel_compact");
}

}  // namespace pat::cuda
