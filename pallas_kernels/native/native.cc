// The entry points that XLA calls, and the choice of an instruction set.
// XLA's foreign function interface: https://openxla.org/xla/custom_call
#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstring>
#include <functional>
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
OCTAVO_KERNELS(avx512vnni)
OCTAVO_KERNELS(avx512bf16)
#else
OCTAVO_KERNELS(vector)
#endif

// Those that this machine runs, best first.
static std::vector<const Kernels*> usable() {
#ifdef __x86_64__
  std::vector<const Kernels*> found;
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq")) {
    const bool vnni = __builtin_cpu_supports("avx512vnni");
    if (vnni && __builtin_cpu_supports("avx512bf16")) found.push_back(&avx512bf16::kernels);
    if (vnni) found.push_back(&avx512vnni::kernels);
    found.push_back(&avx512::kernels);
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back(&avx2::kernels);
  return found;
#else
  return {&vector::kernels};
#endif
}

// null: there is none of that name.
static const Kernels* kernels_of(std::string_view isa) {
  static const std::vector<const Kernels*> found = usable();
  for (const Kernels* kernels : found)
    if (isa == kernels->name) return kernels;
  return nullptr;
}

}  // namespace octavo

// The attribute "isa": what the program was compiled for, which may have been on another machine.
template <>
struct xla::ffi::AttrDecoding<const octavo::Kernels*> {
  using Type = const octavo::Kernels*;

  static bool Isa(XLA_FFI_AttrType type, void*) { return type == XLA_FFI_AttrType_STRING; }

  static std::optional<Type> Decode(XLA_FFI_AttrType type, void* attr, DiagnosticEngine& diagnostic) {
    const auto isa = AttrDecoding<std::string_view>::Decode(type, attr, diagnostic);
    if (!isa) return std::nullopt;
    const octavo::Kernels* kernels = octavo::kernels_of(*isa);
    if (kernels == nullptr) return diagnostic.Emit("no native kernels for ") << std::string(*isa);
    return kernels;
  }
};

namespace octavo {

constexpr int kSpins = 2000;  // tens of microseconds: a late task ends sooner than a thread sleeps and wakes

static void pause() {
#ifdef __x86_64__
  __builtin_ia32_pause();
#endif
}

// Tasks that a few threads take one after the other. Outlives the call: a helper that XLA's pool starts late
// finds nothing to do, and nobody waits for it.
struct Work {
  std::function<void(int64_t)> task;
  int64_t num_tasks;
  std::atomic<int64_t> next{0}, done{0};
  std::mutex mutex;
  std::condition_variable all_done;

  void run() {
    int64_t mine = 0;
    for (int64_t i = next++; i < num_tasks; i = next++, ++mine) task(i);
    if (mine && (done += mine) == num_tasks) {
      std::lock_guard<std::mutex> lock(mutex);
      all_done.notify_all();
    }
  }

  void wait() {
    for (int turn = 0; turn < kSpins; ++turn) {
      if (done == num_tasks) return;
      pause();
    }
    std::unique_lock<std::mutex> lock(mutex);
    all_done.wait(lock, [this] { return done == num_tasks; });
  }
};

static int64_t threads_of(const ffi::ThreadPool& pool) { return std::max<int64_t>(pool.num_threads(), 1); }

// task(i) for every i below num_tasks, on XLA's threads and this one.
static void run_all(ffi::ThreadPool& pool, int64_t num_tasks, std::function<void(int64_t)> task) {
  auto work = std::make_shared<Work>();
  work->task = std::move(task);
  work->num_tasks = num_tasks;
  for (int64_t i = 1; i < std::min(threads_of(pool), num_tasks); ++i) pool.Schedule([work] { work->run(); });
  work->run();
  work->wait();
}

// task(begin, end) of all of `count` rows of `size` numbers: as many rows at once as have `worth` numbers, or one.
template <typename Task>
static void run_rows(ffi::ThreadPool& pool, int64_t count, int64_t size, int64_t worth, Task task) {
  const int64_t each = std::max<int64_t>(1, worth / size);
  run_all(pool, (count + each - 1) / each, [&](int64_t i) { task(i * each, std::min((i + 1) * each, count)); });
}

static Type type_of(const ffi::AnyBuffer& buffer) {
  if (buffer.element_type() == ffi::DataType::F32) return Type::kFloat32;
  return buffer.element_type() == ffi::DataType::BF16 ? Type::kBFloat16 : Type::kInt8;
}

constexpr int64_t kCopied = 1 << 14;  // numbers that are worth a task

static float widened(uint16_t bfloat16) {
  const uint32_t bits = static_cast<uint32_t>(bfloat16) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}

// `read(i)` of k numbers; with a group, of each group 0, group / 2, 1, group / 2 + 1, ...
template <typename T, typename Read>
static void arranged(T* out, int64_t k, int64_t group, Read read) {
  if (group == 0)
    for (int64_t i = 0; i < k; ++i) out[i] = read(i);
  else
    for (int64_t g = 0; g < k; g += group)
      for (int64_t i = 0; i < group / 2; ++i) {
        out[g + 2 * i] = read(g + i);
        out[g + 2 * i + 1] = read(g + group / 2 + i);
      }
}

// What a call keeps of x while it runs.
struct Copies {
  std::unique_ptr<float[]> floats, sums, scales;
  std::unique_ptr<uint16_t[]> halves;
  std::unique_ptr<int8_t[]> numbers;
  std::unique_ptr<int32_t[]> totals;
};

// Rounds x, with a scale for every `group` numbers of a row.
static void round(ffi::ThreadPool& pool, const Kernels& kernels, const ffi::AnyBuffer& from, int64_t group, Matmul& m,
                  Copies& copies) {
  copies.numbers.reset(new int8_t[m.tokens * m.k]);
  copies.scales.reset(new float[m.tokens * (m.k / group)]);
  copies.totals.reset(new int32_t[m.tokens * (m.k / kRoundedRows)]);
  m.rounded = {from.untyped_data(), from.element_type() == ffi::DataType::BF16, m.k, group,
               copies.numbers.get(), copies.scales.get(), copies.totals.get()};
  run_rows(pool, m.tokens, m.k, kCopied, [&](int64_t begin, int64_t end) { kernels.round(m.rounded, begin, end); });
}

// Sets x: as it is where it can be; else copied, rows by threads, in float32 or, for products by pairs, in bfloat16 with
// the sums of its groups. Of int4 weights its columns get the order of their bytes; see Matmul.
static void prepare(ffi::ThreadPool& pool, const Kernels& kernels, const ffi::AnyBuffer& from, Matmul& m, Copies& copies) {
  const bool wide = from.element_type() == ffi::DataType::F32, packed = m.type == Type::kInt8 || m.type == Type::kInt4;
  const bool paired = kernels.halves && !wide && (packed ? m.group % 2 == 0 && !m.transposed : m.type == Type::kBFloat16);
  const bool summed = paired && packed && m.offsets != nullptr;
  const int64_t group = m.type == Type::kInt4 ? m.group : 0, groups = packed ? m.k / m.group : 0;
  const auto* floats = static_cast<const float*>(from.untyped_data());
  const auto* halves = static_cast<const uint16_t*>(from.untyped_data());
  if (paired) m.halves = halves;
  else if (wide) m.x = floats;
  const bool copied = group != 0 || !(paired || wide);
  if (!copied && !summed) return;
  if (copied && paired) {
    copies.halves.reset(new uint16_t[m.tokens * m.k]);
    m.halves = copies.halves.get();
  } else if (copied) {
    copies.floats.reset(new float[m.tokens * m.k]);
    m.x = copies.floats.get();
  }
  if (summed) {
    copies.sums.reset(new float[m.tokens * groups]);
    m.sums = copies.sums.get();
  }
  const auto copy = [&](int64_t t) {
    const int64_t first = t * m.k;
    if (paired) arranged(copies.halves.get() + first, m.k, group, [&](int64_t i) { return halves[first + i]; });
    else if (wide) arranged(copies.floats.get() + first, m.k, group, [&](int64_t i) { return floats[first + i]; });
    else arranged(copies.floats.get() + first, m.k, group, [&](int64_t i) { return widened(halves[first + i]); });
  };
  const auto sum = [&](int64_t t, int64_t g) {
    float total = 0;
    for (int64_t i = g * m.group; i < (g + 1) * m.group; ++i) total += widened(halves[t * m.k + i]);
    copies.sums[t * groups + g] = total;
  };
  run_rows(pool, m.tokens, m.k, kCopied, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      if (copied) copy(t);
      for (int64_t g = 0; summed && g < groups; ++g) sum(t, g);
    }
  });
}

constexpr int64_t kTaskTokens = 192;  // rows of x of a task: they stay in L2 while all its columns of w pass

// Everything of `m` is set; y's columns, and its rows where they are many, are divided among tasks.
static ffi::Error by_columns(ffi::ThreadPool& pool, const Kernels& kernels, const Matmul& m, const ffi::AnyBuffer& w) {
  if (m.k % kernels.lanes || m.n % kernels.lanes)
    return ffi::Error::InvalidArgument("columns and rows must be whole vectors");
  const int64_t panel = 2 * kernels.lanes;
  if (m.in_panels && (m.n % panel || w.dimensions()[2] != panel))
    return ffi::Error::InvalidArgument("panels have " + std::to_string(panel) + " columns");
  // A few tasks a thread, so that a late one costs little.
  const int64_t unit = m.in_panels ? panel : kernels.lanes, units = m.n / unit;
  const int64_t wanted = std::max<int64_t>(1, std::min(m.n / panel, 4 * threads_of(pool)));
  const int64_t width = (units + wanted - 1) / wanted * unit, parts = (m.tokens + kTaskTokens - 1) / kTaskTokens;
  run_all(pool, (m.n + width - 1) / width * parts, [&](int64_t i) {
    const int64_t t = i % parts * kTaskTokens, c = i / parts * width;
    Matmul task = m;
    task.after = std::min((i + threads_of(pool)) / parts * width, m.n);
    task.tokens = std::min(kTaskTokens, m.tokens - t);
    if (m.narrow_y != nullptr) task.narrow_y += t * m.n;
    else task.y += t * m.n;
    if (m.halves != nullptr) task.halves += t * m.k;
    else if (m.x != nullptr) task.x += t * m.k;
    if (m.sums != nullptr) task.sums += t * (m.k / m.group);
    if (m.rounded.numbers != nullptr) {
      task.rounded.numbers += t * m.k;
      task.rounded.scales += t * (m.k / m.rounded.group);
      task.rounded.sums += t * (m.k / kRoundedRows);
      kernels.rounded_columns(task, c, std::min(c + width, m.n));
    } else {
      kernels.columns(task, c, std::min(c + width, m.n));
    }
  });
  return ffi::Error::Success();
}

static Matmul matmul_of(const ffi::AnyBuffer& x, const ffi::AnyBuffer& w, ffi::Result<ffi::AnyBuffer>& y, bool in_panels) {
  Matmul m{};
  m.w = w.untyped_data();
  if (y->element_type() == ffi::DataType::BF16) m.narrow_y = static_cast<uint16_t*>(y->untyped_data());
  else m.y = static_cast<float*>(y->untyped_data());
  m.tokens = x.dimensions()[0];
  m.k = x.dimensions()[1];
  m.n = y->dimensions()[1];
  m.in_panels = in_panels;
  return m;
}

static ffi::Error matmul(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer w, ffi::Result<ffi::AnyBuffer> y,
                         const Kernels* kernels, bool transposed, bool in_panels) {
  Matmul m = matmul_of(x, w, y, in_panels);
  m.transposed = transposed;
  m.type = type_of(w);
  m.group = m.k;
  Copies copies;
  prepare(pool, *kernels, x, m, copies);
  if (m.narrow_y != nullptr && (m.halves == nullptr || transposed || m.type != Type::kBFloat16))
    return ffi::Error::InvalidArgument("results in bfloat16 are for bfloat16 products");
  return by_columns(pool, *kernels, m, w);
}

static ffi::Error packed_matmul(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer values, ffi::AnyBuffer scales,
                                ffi::AnyBuffer offsets, ffi::Result<ffi::AnyBuffer> y, const Kernels* kernels,
                                bool in_panels, int64_t rounded) {
  Matmul m = matmul_of(x, values, y, in_panels);
  m.type = values.element_type() == ffi::DataType::U8 ? Type::kInt4 : Type::kInt8;
  m.scales = scales.untyped_data();
  m.offsets = offsets.element_count() ? offsets.untyped_data() : nullptr;
  m.scales_type = type_of(scales);
  m.group = m.k / scales.dimensions()[in_panels ? 1 : 0];
  Copies copies;
  if (rounded == 0) prepare(pool, *kernels, x, m, copies);
  else if (kernels->round == nullptr || m.k % rounded || rounded % kRoundedRows || m.group % kRoundedRows ||
           (m.type == Type::kInt4 && m.group > kRoundedInt4Group))
    return ffi::Error::InvalidArgument("no products of rounded rows in groups of " + std::to_string(m.group));
  else round(pool, *kernels, x, rounded, m, copies);
  if (m.narrow_y != nullptr && m.halves == nullptr && rounded == 0)
    return ffi::Error::InvalidArgument("results in bfloat16 are for products by pairs and of rounded rows");
  return by_columns(pool, *kernels, m, values);
}

// The numbers are in blocks, in turn the gate's and those that it lets through.
static ffi::Error gate(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::Result<ffi::AnyBuffer> out, const Kernels* kernels,
                       int64_t block) {
  if (block % (kernels->lanes / 2)) return ffi::Error::InvalidArgument("blocks must be whole vectors");
  const Gate g{x.untyped_data(), out->untyped_data(), x.element_type() == ffi::DataType::BF16, block};
  const int64_t blocks = static_cast<int64_t>(x.element_count()) / (2 * block);
  run_rows(pool, blocks, block, kCopied, [&](int64_t begin, int64_t end) { kernels->gate(g, begin, end); });
  return ffi::Error::Success();
}

constexpr int64_t kNormed = 1 << 16;  // numbers that are worth a task: fewer are done before a thread wakes

// y, and with it the sum, is empty where nothing is added.
static ffi::Error norm(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer y, ffi::BufferR2<ffi::F32> weight,
                       ffi::Result<ffi::AnyBuffer> sum, ffi::Result<ffi::AnyBuffer> out, const Kernels* kernels, float eps) {
  const int64_t turns = weight.dimensions()[0], size = weight.dimensions()[1];
  if (size % (kernels->lanes / 2)) return ffi::Error::InvalidArgument("rows must be whole vectors");
  const void* added = y.element_count() ? y.untyped_data() : nullptr;
  const bool is_bfloat16 = x.element_type() == ffi::DataType::BF16;
  const Norm n{x.untyped_data(), added, weight.typed_data(), sum->untyped_data(), out->untyped_data(), is_bfloat16,
               size, turns, eps};
  const int64_t rows = static_cast<int64_t>(x.element_count()) / size;
  run_rows(pool, rows, size, kNormed, [&](int64_t begin, int64_t end) { kernels->norm(n, begin, end); });
  return ffi::Error::Success();
}

static ffi::Error rope(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::BufferR2<ffi::F32> cos, ffi::BufferR2<ffi::F32> sin,
                       ffi::Result<ffi::AnyBuffer> q, ffi::Result<ffi::AnyBuffer> kv, const Kernels* kernels) {
  const auto sizes = x.dimensions();
  const Rope r{x.untyped_data(), cos.typed_data(), sin.typed_data(), q->untyped_data(), kv->untyped_data(),
               x.element_type() == ffi::DataType::BF16, sizes[1], sizes[2], sizes[3], cos.dimensions()[1]};
  if (r.rotated % kernels->lanes || r.head_dim % (kernels->lanes / 2))
    return ffi::Error::InvalidArgument("halves of what turns, and heads, must be whole vectors");
  const int64_t size = r.heads * r.turns * r.head_dim;
  run_rows(pool, sizes[0], size, kNormed, [&](int64_t begin, int64_t end) { kernels->rope(r, begin, end); });
  return ffi::Error::Success();
}

static ffi::Error greedy(ffi::ThreadPool pool, ffi::BufferR2<ffi::F32> logits, ffi::ResultBufferR1<ffi::S32> token,
                         ffi::ResultBufferR1<ffi::PRED> faulty, const Kernels* kernels) {
  const int64_t rows = logits.dimensions()[0], vocab = logits.dimensions()[1];
  const Greedy g{logits.typed_data(), token->typed_data(), faulty->typed_data(), vocab};
  run_rows(pool, rows, vocab, kNormed, [&](int64_t begin, int64_t end) { kernels->greedy(g, begin, end); });
  return ffi::Error::Success();
}

// What decode and prefill calls share. `heads` KV heads stand head_stride elements apart in a page's row, each key
// value_offset before its value; exponents: where a quantized row's powers of two begin.
struct Layout {
  int64_t heads, head_stride, value_offset, exponents;
};

static Attention attention_of(const ffi::AnyBuffer& q, const ffi::AnyBuffer& pages, const ffi::BufferR2<ffi::S32>& tables,
                              const ffi::BufferR1<ffi::F32>& sinks, ffi::Result<ffi::AnyBuffer>& out, const Layout& layout,
                              float scale, float softcap, int64_t window) {
  Attention a{};
  a.q = q.untyped_data();
  a.pages = pages.untyped_data();
  a.tables = tables.typed_data();
  a.sinks = sinks.element_count() ? sinks.typed_data() : nullptr;
  a.out = out->untyped_data();
  a.q_is_bfloat16 = q.element_type() == ffi::DataType::BF16;
  a.type = type_of(pages);
  a.q_heads = q.dimensions()[1];
  a.head_dim = q.dimensions()[2];
  a.value_dim = out->dimensions()[2];
  a.pages_per_seq = tables.dimensions()[1];
  a.page_size = pages.dimensions()[1];
  a.width = pages.dimensions()[2];
  a.kv_heads = layout.heads;
  a.head_stride = layout.head_stride;
  a.value_offset = layout.value_offset;
  a.exponents = layout.exponents;
  a.scale = scale;
  a.softcap = softcap;
  a.window = window;
  return a;
}

static float* scratch_of(const Attention& a) {
  static thread_local std::vector<float> memory;
  if (static_cast<int64_t>(memory.size()) < scratch_floats(a)) memory.resize(scratch_floats(a));
  return memory.data();
}

// The queries of one row of tables, cut into what a task takes: kTaskRows queries times heads of one KV head.
static void add_tasks(const Attention& a, Queries all, std::vector<Queries>& tasks) {
  const int64_t group = a.q_heads / a.kv_heads, heads = std::min(group, kTaskRows), block = kTaskRows / heads;
  for (int64_t head = 0; head < a.q_heads; head += group)
    for (int64_t h = 0; h < group; h += heads)
      for (int64_t i = 0; i < all.count; i += block)
        tasks.push_back({all.table, all.token + i, std::min(block, all.count - i), all.position + i, head + h,
                         std::min(heads, group - h)});
}

// One query, all heads that a task can take: its KV heads lie beside each other in memory.
static void add_whole(const Attention& a, Queries query, std::vector<Queries>& tasks) {
  const int64_t group = a.q_heads / a.kv_heads;
  if (group > kTaskRows) return add_tasks(a, query, tasks);
  const int64_t heads = kTaskRows / group * group;
  for (query.head = 0; query.head < a.q_heads; query.head += heads) {
    query.num_heads = std::min(heads, a.q_heads - query.head);
    tasks.push_back(query);
  }
}

static void zero(const Attention& a, int64_t begin, int64_t end) {
  const int64_t token = a.q_heads * a.value_dim * (a.q_is_bfloat16 ? 2 : 4);
  std::memset(static_cast<char*>(a.out) + begin * token, 0, (end - begin) * token);
}

static ffi::Error decode(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer pages, ffi::BufferR2<ffi::S32> tables,
                         ffi::BufferR1<ffi::S32> lens, ffi::BufferR1<ffi::F32> sinks, ffi::Result<ffi::AnyBuffer> out,
                         const Kernels* kernels, int64_t heads, int64_t head_stride, int64_t value_offset,
                         int64_t exponents, float scale, float softcap, int64_t window) {
  const Attention a =
      attention_of(q, pages, tables, sinks, out, {heads, head_stride, value_offset, exponents}, scale, softcap, window);
  std::vector<Queries> tasks;
  const int64_t rows = lens.dimensions()[0];
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t len = lens.typed_data()[row];
    const Queries query{row, row, 1, len - 1, 0, 0};
    if (len <= 0) zero(a, row, row + 1);
    else if (rows < 4 * threads_of(pool)) add_tasks(a, query, tasks);
    else add_whole(a, query, tasks);
  }
  // A long context is cut into parts that threads share.
  struct Part {
    int64_t task, part, state;  // state -1: the task's only part
  };
  std::vector<Part> parts;
  std::vector<int64_t> states(tasks.size());
  int64_t floats = 0;
  const auto first_key = [&](const Queries& task) { return a.window ? std::max<int64_t>(task.position - a.window + 1, 0) : 0; };
  for (size_t i = 0; i < tasks.size(); ++i) {
    const int64_t first = first_key(tasks[i]) / kPart, last = tasks[i].position / kPart;
    states[i] = floats;
    for (int64_t p = first; p <= last; ++p) {
      parts.push_back({static_cast<int64_t>(i), p, first == last ? -1 : floats});
      if (first != last) floats += state_floats(a, tasks[i].num_heads);
    }
  }
  std::vector<float> memory(floats);
  run_all(pool, parts.size(), [&](int64_t i) {
    const Part& part = parts[i];
    const Queries& task = tasks[part.task];
    const size_t next = i + threads_of(pool);  // what this thread is likely to take after this
    Keys keys{};
    if (next < parts.size()) {
      keys.queries = tasks[parts[next].task];
      keys.first = std::max(parts[next].part * kPart, first_key(keys.queries));
    }
    const Keys* after = next < parts.size() ? &keys : nullptr;
    if (part.state < 0) kernels->attend(a, task, after, scratch_of(a));
    else kernels->attend_part(a, task, part.part, after, memory.data() + part.state, scratch_of(a));
  });
  for (size_t i = 0; i < tasks.size(); ++i) {
    const int64_t end = i + 1 < tasks.size() ? states[i + 1] : floats;
    const int64_t count = (end - states[i]) / state_floats(a, tasks[i].num_heads);
    if (count) kernels->merge(a, tasks[i], count, memory.data() + states[i]);
  }
  return ffi::Error::Success();
}

static ffi::Error prefill(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer pages, ffi::BufferR2<ffi::S32> tables,
                          ffi::BufferR1<ffi::S32> starts, ffi::BufferR1<ffi::S32> lens, ffi::BufferR1<ffi::S32> positions,
                          ffi::BufferR1<ffi::F32> sinks, ffi::Result<ffi::AnyBuffer> out, const Kernels* kernels,
                          int64_t heads, int64_t head_stride, int64_t value_offset, int64_t exponents, float scale,
                          float softcap, int64_t window) {
  const Attention a =
      attention_of(q, pages, tables, sinks, out, {heads, head_stride, value_offset, exponents}, scale, softcap, window);
  std::vector<Queries> tasks;
  int64_t next = 0;  // tokens before it are somebody's, or zeroed
  for (int64_t row = 0; row < lens.dimensions()[0]; ++row) {
    const int64_t start = starts.typed_data()[row], len = lens.typed_data()[row];
    if (len == 0) continue;
    zero(a, next, start);
    next = start + len;
    add_tasks(a, {row, start, len, positions.typed_data()[row], 0, 0}, tasks);
  }
  zero(a, next, q.dimensions()[0]);
  run_all(pool, tasks.size(), [&](int64_t i) { kernels->attend(a, tasks[i], nullptr, scratch_of(a)); });
  return ffi::Error::Success();
}

}  // namespace octavo

#pragma GCC visibility push(default)
XLA_FFI_DEFINE_HANDLER_SYMBOL(octavo_matmul, octavo::matmul,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<const octavo::Kernels*>("isa")
                                  .Attr<bool>("transposed")
                                  .Attr<bool>("in_panels"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(octavo_packed_matmul, octavo::packed_matmul,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<const octavo::Kernels*>("isa")
                                  .Attr<bool>("in_panels")
                                  .Attr<int64_t>("rounded"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(octavo_gate, octavo::gate,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<const octavo::Kernels*>("isa")
                                  .Attr<int64_t>("block"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(octavo_norm, octavo::norm,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::BufferR2<ffi::F32>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<const octavo::Kernels*>("isa")
                                  .Attr<float>("eps"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(octavo_rope, octavo::rope,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::BufferR2<ffi::F32>>()
                                  .Arg<ffi::BufferR2<ffi::F32>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<const octavo::Kernels*>("isa"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(octavo_greedy, octavo::greedy,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::BufferR2<ffi::F32>>()
                                  .Ret<ffi::BufferR1<ffi::S32>>()
                                  .Ret<ffi::BufferR1<ffi::PRED>>()
                                  .Attr<const octavo::Kernels*>("isa"));

#define OCTAVO_ATTENTION_ATTRIBUTES   \
  .Arg<ffi::BufferR1<ffi::F32>>()     \
      .Ret<ffi::AnyBuffer>()          \
      .Attr<const octavo::Kernels*>("isa")  \
      .Attr<int64_t>("heads")         \
      .Attr<int64_t>("head_stride")   \
      .Attr<int64_t>("value_offset")  \
      .Attr<int64_t>("exponents")     \
      .Attr<float>("scale")           \
      .Attr<float>("softcap")         \
      .Attr<int64_t>("window")

XLA_FFI_DEFINE_HANDLER_SYMBOL(octavo_decode_attention, octavo::decode,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::BufferR2<ffi::S32>>()
                                  .Arg<ffi::BufferR1<ffi::S32>>() OCTAVO_ATTENTION_ATTRIBUTES);

XLA_FFI_DEFINE_HANDLER_SYMBOL(octavo_prefill_attention, octavo::prefill,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::BufferR2<ffi::S32>>()
                                  .Arg<ffi::BufferR1<ffi::S32>>()
                                  .Arg<ffi::BufferR1<ffi::S32>>()
                                  .Arg<ffi::BufferR1<ffi::S32>>() OCTAVO_ATTENTION_ATTRIBUTES);
#pragma GCC visibility pop

// The instruction sets of this machine that were compiled in, best first, with commas between them.
extern "C" __attribute__((visibility("default"))) const char* octavo_isas() {
  static const std::string names = [] {
    std::string joined;
    for (const octavo::Kernels* kernels : octavo::usable()) joined += (joined.empty() ? "" : ",") + std::string(kernels->name);
    return joined;
  }();
  return names.c_str();
}
