// SiLU of one half times the other.
#include "kernels.h"
#include "vectors.h"

namespace octavo::ISA {
namespace {

inline Vec silu(Vec x) {
  const Vec least = splat(-88.0f);  // from where on it is 0, but for 1e-36
  x = x < least ? least : x;
  return x / (exponential(-x) + 1.0f);
}

}  // namespace

void gate(const Gate& g, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i)
    for (int64_t j = 0; j < g.block; j += kLanes) {
      const int64_t from = 2 * i * g.block + j, up = from + g.block, to = i * g.block + j;
      if (!g.is_bfloat16) {
        const auto* x = static_cast<const float*>(g.x);
        write(static_cast<float*>(g.out) + to, silu(widen(x + from)) * widen(x + up));
      } else {
        const auto* x = static_cast<const uint16_t*>(g.x);
        uint16_t* out = static_cast<uint16_t*>(g.out) + to;
        narrow(out, silu(widen(x + from)));
        narrow(out, widen(out) * widen(x + up));
      }
    }
}

}  // namespace octavo::ISA
