// Queries and keys turned by their position, and parted.
#include "kernels.h"
#include "vectors.h"

namespace octavo::ISA {
namespace {

template <typename T>
inline void rotate(const Rope& r, const T* x, const float* cos, const float* sin, T* out) {
  const int64_t half = r.rotated / 2;
  for (int64_t j = 0; j < half; j += kLanes) {
    const Vec left = widen(x + j), right = widen(x + half + j), c = widen(cos + j), s = widen(sin + j);
    put(out + j, left * c - right * s);
    put(out + half + j, right * c + left * s);
  }
  std::memcpy(out + r.rotated, x + r.rotated, (r.head_dim - r.rotated) * sizeof(T));
}

template <typename T>
void rotate_tokens(const Rope& r, int64_t begin, int64_t end) {
  const int64_t queries = r.turns - 2;
  const T* x = static_cast<const T*>(r.x) + begin * r.heads * r.turns * r.head_dim;
  T* q = static_cast<T*>(r.q) + begin * r.heads * queries * r.head_dim;
  T* kv = static_cast<T*>(r.kv) + begin * r.heads * 2 * r.head_dim;
  for (int64_t t = begin; t < end; ++t) {
    const float *cos = r.cos + t * r.rotated, *sin = r.sin + t * r.rotated;
    for (int64_t head = 0; head < r.heads; ++head) {
      for (int64_t i = 0; i < queries; ++i, x += r.head_dim, q += r.head_dim) rotate(r, x, cos, sin, q);
      rotate(r, x, cos, sin, kv);
      std::memcpy(kv + r.head_dim, x + r.head_dim, r.head_dim * sizeof(T));
      x += 2 * r.head_dim;
      kv += 2 * r.head_dim;
    }
  }
}

}  // namespace

void rope(const Rope& r, int64_t begin, int64_t end) {
  if (r.is_bfloat16) rotate_tokens<uint16_t>(r, begin, end);
  else rotate_tokens<float>(r, begin, end);
}

}  // namespace octavo::ISA
