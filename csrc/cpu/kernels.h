// Interface of the CPU kernels. Every instruction set implements it in a namespace of its own.
#pragma once
#include "../args.h"
#include "rows.h"

#define NFT_DECLARE(isa)                                           \
  namespace isa {                                                  \
  void nft_loss(const LossArgs&);                                  \
  void add_noise(const NoiseArgs&);                                \
  void solver_step(const StepArgs&);                               \
  void layer_norm_modulate(const LayerNormArgs&);                  \
  void layer_norm_modulate_gradient(const LayerNormGradientArgs&); \
  void qk_norm(const QkNormArgs&);                                 \
  void gelu(const GeluArgs&);                                      \
  void group_norm_silu(const GroupNormArgs&);                      \
  void attention(const AttentionArgs&);                            \
  void attention_gradient(const AttentionArgs&);                   \
  }

namespace nft {

NFT_DECLARE(baseline)
NFT_DECLARE(avx2)
NFT_DECLARE(avx512)

}  // namespace nft
