// The entry points that XLA calls, and the choice of an instruction set.
// XLA's foreign function interface: https://openxla.org/xla/custom_call
#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "kernels.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace octavo {
#define OCTAVO_KERNELS(isa) \
  namespace isa {           \
  extern const Kernels kernels; \
  }
#ifdef __x86_64__
OCTAVO_KERNELS(avx2)
OCTAVO_KERNELS(avx512)
#else
OCTAVO_KERNELS(vector)
#endif

// Best first. null: this machine runs none of them.
static const Kernels* found(const std::string& wanted) {
  std::vector<const Kernels*> usable;
#ifdef __x86_64__
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq"))
    usable.push_back(&avx512::kernels);
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) usable.push_back(&avx2::kernels);
#else
  usable.push_back(&vector::kernels);
#endif
  for (const Kernels* kernels : usable)
    if (wanted.empty() || wanted == kernels->name) return kernels;
  return nullptr;
}

// Tasks that a few threads take one after the other. Outlives the call: a helper that XLA's pool starts late
// finds nothing to do, and nobody waits for it.
struct Work {
  std::vector<float> x;
  Matmul matmul;
  int64_t width;  // columns of a task
  int64_t num_tasks;
  void (*columns)(const Matmul&, int64_t, int64_t);
  std::atomic<int64_t> next{0}, done{0};
  std::mutex mutex;
  std::condition_variable all_done;

  void run() {
    int64_t mine = 0;
    for (int64_t i = next++; i < num_tasks; i = next++, ++mine) {
      const int64_t begin = i * width;
      columns(matmul, begin, std::min(begin + width, matmul.n));
    }
    if (mine && (done += mine) == num_tasks) {
      std::lock_guard<std::mutex> lock(mutex);
      all_done.notify_all();
    }
  }

  void wait() {
    std::unique_lock<std::mutex> lock(mutex);
    all_done.wait(lock, [this] { return done == num_tasks; });
  }
};

// x in float32: as it is, or widened into `to`.
static const float* widened(std::vector<float>& to, const ffi::AnyBuffer& from) {
  if (from.element_type() == ffi::DataType::F32) return static_cast<const float*>(from.untyped_data());
  const int64_t count = from.element_count();
  to.resize(count);
  const auto* bits = static_cast<const uint16_t*>(from.untyped_data());
  auto* wide = reinterpret_cast<uint32_t*>(to.data());
  for (int64_t i = 0; i < count; ++i) wide[i] = static_cast<uint32_t>(bits[i]) << 16;
  return to.data();
}

static ffi::Error matmul(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer w, ffi::Result<ffi::BufferR2<ffi::F32>> y,
                         std::string_view isa, bool transposed) {
  const Kernels* kernels = found(std::string(isa));
  if (kernels == nullptr) return ffi::Error::InvalidArgument("no native kernels for " + std::string(isa));
  auto work = std::make_shared<Work>();
  Matmul& m = work->matmul;
  m.x = widened(work->x, x);
  m.w = w.untyped_data();
  m.y = y->typed_data();
  m.tokens = x.dimensions()[0];
  m.k = x.dimensions()[1];
  m.n = y->dimensions()[1];
  m.transposed = transposed;
  m.type = w.element_type() == ffi::DataType::F32    ? WeightType::kFloat32
           : w.element_type() == ffi::DataType::BF16 ? WeightType::kBFloat16
                                                     : WeightType::kInt8;
  if (m.k % kernels->lanes || m.n % kernels->lanes)
    return ffi::Error::InvalidArgument("columns and rows must be whole vectors");
  const int64_t threads = std::max<int64_t>(pool.num_threads(), 1);
  const int64_t lines = m.n / kernels->lanes;
  // A few tasks a thread, so that a late one costs little; at least four register tiles each.
  const int64_t wanted = std::max<int64_t>(1, std::min(lines / 4, 4 * threads));
  work->width = (lines + wanted - 1) / wanted * kernels->lanes;
  work->num_tasks = (m.n + work->width - 1) / work->width;
  work->columns = kernels->columns;
  for (int64_t i = 1; i < std::min(threads, work->num_tasks); ++i) pool.Schedule([work] { work->run(); });
  work->run();
  work->wait();
  return ffi::Error::Success();
}

}  // namespace octavo

#pragma GCC visibility push(default)
XLA_FFI_DEFINE_HANDLER_SYMBOL(octavo_matmul, octavo::matmul,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::BufferR2<ffi::F32>>()
                                  .Attr<std::string_view>("isa")
                                  .Attr<bool>("transposed"));
#pragma GCC visibility pop

// The best instruction set of this machine that was compiled in; "" when there is none.
extern "C" __attribute__((visibility("default"))) const char* octavo_best_isa() {
  const octavo::Kernels* kernels = octavo::found("");
  return kernels == nullptr ? "" : kernels->name;
}
