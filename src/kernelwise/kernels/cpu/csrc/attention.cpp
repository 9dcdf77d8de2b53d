// Attention: softmax(q k^T scale + mask) v, without the scores of more than one block in memory.
//
// The rows of all heads that share their keys are taken together. A block of keys becomes float32 and is laid out in panels
// in the cache, as in gemm.cpp, and meets every row that sees one of them; so do its values. Largest score and sum of a row
// are kept from block to block. Compiled once per instruction set; there is none without AVX2.
#include "panels.h"

namespace kernelwise {
namespace {

#if defined(__AVX2__)

constexpr int64_t kRows = 192, kKeys = 96;  // rows of a task at most, keys of a block

static inline int64_t whole_panels(int64_t num) { return (num + kPanel - 1) / kPanel * kPanel; }

// Where the pieces of a task lie in scratch memory.
struct Pieces {
  float *q, *scores, *sums, *keys, *values, *mask;
  float *largest, *total;  // of each row's scores so far, and the sum of e^(score - largest)
  float* end;
  Pieces(const AttentionArgs& a, float* scratch) {
    const int64_t rows = a.together * a.each, padded = whole_panels(a.value_width);
    q = scratch;
    scores = q + rows * a.width;
    sums = scores + rows * kKeys;
    keys = sums + rows * padded;
    values = keys + kKeys * a.width;
    mask = values + kKeys * padded;
    largest = mask + kKeys;
    total = largest + rows;
    end = total + rows;
  }
};

static int64_t scratch(const AttentionArgs& a) { return Pieces(a, nullptr).end - static_cast<float*>(nullptr); }

// Adds a mask to num scores of a row; false in a mask of bool is minus infinity.
template <class T>
static void add_mask(const AttentionArgs& a, int64_t offset, float* buffer, float* scores, int64_t num) {
  switch (a.mask_kind) {
    case MaskKind::kNone: return;
    case MaskKind::kBool: {
      const uint8_t* seen = static_cast<const uint8_t*>(a.mask) + offset;
      for (int64_t i = 0; i < num; i++) scores[i] = seen[i] ? scores[i] : -INFINITY;
      return;
    }
    case MaskKind::kFloat32: {
      const float* added = static_cast<const float*>(a.mask) + offset;
      for (int64_t i = 0; i < num; i++) scores[i] += added[i];
      return;
    }
    case MaskKind::kOwn: {
      const float* added = read(static_cast<const T*>(a.mask) + offset, buffer, num);
      for (int64_t i = 0; i < num; i++) scores[i] += added[i];
    }
  }
}

// Scores become e^(score - largest), with the largest that the row has now; what it has so far is brought to that.
static void weigh(float* scores, int64_t num, float* sums, int64_t width, float& largest, float& total) {
  float most = largest;
#pragma omp simd reduction(max : most)
  for (int64_t i = 0; i < num; i++) most = scores[i] > most ? scores[i] : most;
  const float base = most == -INFINITY ? 0.0f : most;  // nothing seen yet: zeros, not NaN
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < num; i++) {
    scores[i] = exp_of(scores[i] - base);
    sum += scores[i];
  }
  if (most != largest) {
    const float before = exp_of(largest - base);
    for (int64_t i = 0; i < width; i++) sums[i] *= before;
    total *= before;
    largest = most;
  }
  total += sum;
}

static inline Vector load(const float* from) { return *reinterpret_cast<const Vector*>(from); }

static inline Vector load(const bf16* from) {
  typedef uint16_t Halves __attribute__((vector_size(kLanes * 2), aligned(2), may_alias));
  typedef uint32_t Bits __attribute__((vector_size(kLanes * 4)));
  return reinterpret_cast<Vector>(__builtin_convertvector(*reinterpret_cast<const Halves*>(from), Bits) << 16);
}

static inline Vector load(const fp16* from) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vector>(
      _mm512_maskz_cvtph_ps(__mmask16(-1), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
#else
  return reinterpret_cast<Vector>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#endif
}

// The sums over each of four vectors.
static inline __m128 sums_of(const Vector* v) {
  __m256 a[4];
  for (int i = 0; i < 4; i++) {
#if defined(__AVX512F__)
    const __m512 wide = reinterpret_cast<__m512>(v[i]);
    a[i] = _mm256_add_ps(_mm512_castps512_ps256(wide), _mm512_extractf32x8_ps(wide, 1));
#else
    a[i] = reinterpret_cast<__m256>(v[i]);
#endif
  }
  const __m256 sums = _mm256_hadd_ps(_mm256_hadd_ps(a[0], a[1]), _mm256_hadd_ps(a[2], a[3]));
  return _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1));
}

// scores[i, 0:num] = q[i] keys^T for R rows, straight from where the keys are: for few rows, laying them out takes longer.
template <class T, int R>
static void score_few(const float* q, const T* keys, int64_t stride, int64_t width, int64_t num, float* scores) {
  const int64_t whole = width / kLanes * kLanes;
  for (int64_t n = 0; n < num; n += 4) {
    const T* row[4];
    for (int64_t j = 0; j < 4; j++) row[j] = keys + smaller(n + j, num - 1) * stride;
    Vector sums[R][4] = {};
    for (int64_t k = 0; k < whole; k += kLanes) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) {
        const Vector key = load(row[j] + k);
#pragma GCC unroll 4
        for (int i = 0; i < R; i++) sums[i][j] += load(q + i * width + k) * key;
      }
    }
    for (int i = 0; i < R; i++) {
      float four[4];
      _mm_storeu_ps(four, sums_of(sums[i]));
      for (int64_t j = 0; j < smaller(4, num - n); j++) {
        for (int64_t k = whole; k < width; k++) {
          float key;
          widen(row[j] + k, &key, 1);
          four[j] += q[i * width + k] * key;
        }
        scores[i * kKeys + n + j] = four[j];
      }
    }
  }
}

// sums[i, 0:width] += scores[i, 0:num] values for R rows.
template <class T, int R>
static void gather_few(const float* scores, const T* values, int64_t stride, int64_t width, int64_t num, float* sums,
                       int64_t sums_stride) {
  int64_t k = 0;
  for (; k + 2 * kLanes <= width; k += 2 * kLanes) {
    Vector s[R][2];
    for (int i = 0; i < R; i++)
      for (int j = 0; j < 2; j++) s[i][j] = load(sums + i * sums_stride + k + j * kLanes);
    for (int64_t n = 0; n < num; n++) {
      const Vector first = load(values + n * stride + k), second = load(values + n * stride + k + kLanes);
#pragma GCC unroll 4
      for (int i = 0; i < R; i++) {
        const float weight = scores[i * kKeys + n];
        s[i][0] += first * weight;
        s[i][1] += second * weight;
      }
    }
    for (int i = 0; i < R; i++)
      for (int j = 0; j < 2; j++) *reinterpret_cast<Vector*>(sums + i * sums_stride + k + j * kLanes) = s[i][j];
  }
  for (int64_t n = 0; k < width && n < num; n++) {
    float left[2 * kLanes];
    widen(values + n * stride + k, left, width - k);
    for (int i = 0; i < R; i++)
      for (int64_t j = k; j < width; j++) sums[i * sums_stride + j] += scores[i * kKeys + n] * left[j - k];
  }
}

template <class T>
struct Few {
  void (*score)(const float* q, const T* keys, int64_t stride, int64_t width, int64_t num, float* scores);
  void (*gather)(const float* scores, const T* values, int64_t stride, int64_t width, int64_t num, float* sums,
                 int64_t sums_stride);
};
constexpr int64_t kFew = 8, kFewAtOnce = 4;  // rows that take this way, and that do so together
template <class T>
constexpr Few<T> kFewRows[kFewAtOnce] = {{score_few<T, 1>, gather_few<T, 1>},
                                         {score_few<T, 2>, gather_few<T, 2>},
                                         {score_few<T, 3>, gather_few<T, 3>},
                                         {score_few<T, 4>, gather_few<T, 4>}};

// Rows of one task: `num` positions from `first` on, of `heads` heads from `head` on, position by position.
struct Part {
  int64_t batch, head, heads, first, num;
  int64_t rows() const { return heads * num; }
  int64_t position(int64_t row) const { return first + row / heads; }
};

template <class T>
static void attend(const AttentionArgs& a, const Part& part, const Pieces& p) {
  const int64_t rows = part.rows(), d = a.width, dv = a.value_width, padded = whole_panels(dv);
  for (int64_t r = 0; r < rows; r++) {
    const int64_t head = part.head + r % part.heads;
    widen(static_cast<const T*>(a.q) + part.batch * a.q_batch + head * a.q_head + part.position(r) * a.q_position, p.q + r * d, d);
    for (int64_t i = 0; i < d; i++) p.q[r * d + i] *= a.scale;
    p.largest[r] = -INFINITY;
    p.total[r] = 0;
  }
  std::memset(p.sums, 0, sizeof(float) * rows * padded);
  const int64_t kv_head = part.head / a.group, last = a.causal ? smaller(a.keys, part.first + part.num) : a.keys;
  const T* k = static_cast<const T*>(a.k) + part.batch * a.k_batch + kv_head * a.k_head;
  const T* v = static_cast<const T*>(a.v) + part.batch * a.v_batch + kv_head * a.v_head;
  for (int64_t begin = 0; begin < last; begin += kKeys) {
    const int64_t num = smaller(kKeys, last - begin);
    // How many keys of the block a row sees; no row sees less than the one before it.
    const auto seen = [&](int64_t row) {
      const int64_t limit = a.causal ? smaller(num, part.position(row) + 1 - begin) : num;
      return limit < 0 ? int64_t(0) : limit;
    };
    const int64_t start = a.causal && begin > part.first ? (begin - part.first) * part.heads : 0;  // the first row that sees one
    const T *keys = k + begin * a.k_position, *values = v + begin * a.v_position;
    const bool few = rows - start <= kFew;
    const int64_t at_once = few ? kFewAtOnce : kTall;
    if (few) {
      for (int64_t r = start; r < rows; r += at_once)
        kFewRows<T>[smaller(at_once, rows - r) - 1].score(p.q + r * d, keys, a.k_position, d, num, p.scores + r * kKeys);
    } else {
      for (int64_t n = 0; n < num; n += kPanel)
        lay_out(keys + n * a.k_position, a.k_position, false, smaller(kPanel, num - n), d, p.keys + n * d);
      for (int64_t n = 0; n < dv; n += kPanel)
        lay_out(values + n, a.v_position, true, smaller(kPanel, dv - n), num, p.values + n * kKeys);
      const float zeros[kPanel] = {};
      for (int64_t n = 0; n < num; n += kPanel) {
        for (int64_t r = start; r < rows; r += at_once) {
          const int64_t tall = smaller(at_once, rows - r), left = seen(r + tall - 1) - n;
          if (left <= 0) continue;
          const int64_t vectors = smaller(kVectors, (left + kLanes - 1) / kLanes);
          kRowsByPanel[vectors - 1][tall - 1]({p.q + r * d, d, p.keys + n * d, d, zeros, 0, p.scores + r * kKeys + n, kKeys, 0});
        }
      }
    }
    for (int64_t r = start; r < rows; r++) {
      float* scores = p.scores + r * kKeys;
      const int64_t limit = seen(r), most = seen(smaller(rows, r - (r - start) % at_once + at_once) - 1);
      const int64_t offset = part.batch * a.mask_batch + (part.head + r % part.heads) * a.mask_head +
                             part.position(r) * a.mask_position + begin;
      add_mask<T>(a, offset, p.mask, scores, limit);
      weigh(scores, limit, p.sums + r * padded, dv, p.largest[r], p.total[r]);
      for (int64_t i = limit; i < most; i++) scores[i] = 0;
    }
    for (int64_t r = start; r < rows && few; r += at_once) {
      const int64_t tall = smaller(at_once, rows - r);
      kFewRows<T>[tall - 1].gather(p.scores + r * kKeys, values, a.v_position, dv, seen(r + tall - 1), p.sums + r * padded,
                                   padded);
    }
    for (int64_t n = 0; n < dv && !few; n += kPanel) {
      const int64_t vectors = smaller(kVectors, (dv - n + kLanes - 1) / kLanes);
      for (int64_t r = start; r < rows; r += at_once) {
        const int64_t tall = smaller(at_once, rows - r);
        float* const sums = p.sums + r * padded + n;
        kRowsByPanel[vectors - 1][tall - 1](
            {p.scores + r * kKeys, kKeys, p.values + n * kKeys, seen(r + tall - 1), sums, padded, sums, padded, 0});
      }
    }
  }
  for (int64_t r = 0; r < rows; r++) {
    const int64_t head = part.head + r % part.heads, position = part.position(r);
    const float scale = p.total[r] == 0 ? 0.0f : 1.0f / p.total[r];  // a row that sees nothing is zero, as torch has it
    float* sums = p.sums + r * padded;
    for (int64_t i = 0; i < dv; i++) sums[i] *= scale;
    narrow(sums, static_cast<T*>(a.out) + ((part.batch * a.positions + position) * a.heads + head) * dv, dv);
  }
}

template <class T>
static void tasks(const AttentionArgs& a, float* memory, int64_t begin, int64_t end) {
  const Pieces pieces(a, memory);
  const int64_t parts = (a.group + a.together - 1) / a.together, shared = a.heads / a.group;
  const int64_t blocks = (a.positions + a.each - 1) / a.each;
  for (int64_t t = begin; t < end; t++) {
    // Late positions see more keys than early ones: taken in turns from both ends, every stretch of tasks takes as long.
    const int64_t turn = t % blocks, block = turn % 2 == 0 ? turn / 2 : blocks - 1 - turn / 2;
    const int64_t of = t / blocks, kv_head = of / parts % shared, head = of % parts * a.together, first = block * a.each;
    attend<T>(a, {of / parts / shared, kv_head * a.group + head, smaller(a.together, a.group - head), first,
                  smaller(a.each, a.positions - first)}, pieces);
  }
}

template <class T>
static Attention attention_of() {
  return {kRows, kFew, scratch, tasks<T>};
}

#endif

}  // namespace

namespace KERNELWISE_ISA {

Attention attention(DType dtype) {
#if defined(__AVX2__)
  switch (dtype) {
    case DType::kFloat32: return attention_of<float>();
    case DType::kBFloat16: return attention_of<bf16>();
    case DType::kFloat16: return attention_of<fp16>();
  }
#endif
  return {0, 0, nullptr, nullptr};
}

}  // namespace KERNELWISE_ISA
}  // namespace kernelwise
