// The patch codec on CPUs: embedding, token dropout and flatten in one pass, its gradient, and the
// gather-sum of a folded encoder. Matmuls between them go through torch.
//
// Fewest bytes, for n = P K tokens of w bytes an element:
//   embed_flatten           n (ids + 8 + 2 H w): a row is read and written once
//   its backward            n (8 + H w) + V H w: rows are read once, in the order of their ids, so
//                           that an id's sum stays in cache, and every gradient row written once
//   folded_squeezed_gather  n (ids + H w) + P H w: no row of K H elements in between
// All three wait for rows at random addresses, so rows are asked for some patches ahead.

#include <algorithm>
#include <atomic>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "common/patch_codec.h"
#include "cpu/dtype_dispatch.h"
#include "cpu/multiversion.h"
#include "cpu/registration.h"

namespace calm {
namespace {

using BFloat16 = torch::headeronly::BFloat16;
using Half = torch::headeronly::Half;

// Bytes per task: about 50 microseconds of work.
constexpr int64_t kGrainBytes = 1 << 19;
constexpr int64_t kCacheLine = 64;
// Patches, and rows of a gradient, between asking for a row and using it.
constexpr int64_t kPatchesAhead = 3;
constexpr int64_t kRowsAhead = 6;
// Columns that are summed together, in the first-level cache.
constexpr int64_t kColumns = 256;

template <typename T>
struct ComputeType {
  using type = float;
};
template <>
struct ComputeType<double> {
  using type = double;
};
template <typename T>
using Compute = typename ComputeType<T>::type;

int64_t grain(int64_t bytes_per_item) {
  return std::max<int64_t>(1, kGrainBytes / std::max<int64_t>(1, bytes_per_item));
}

inline void prefetch_row(const char* row, int64_t bytes) {
  for (int64_t b = 0; b < bytes; b += kCacheLine) __builtin_prefetch(row + b);
}

// sum += row, and row = sum, over some columns. Plain loops for the compiler to vectorise; one
// function a dtype, because a clone cannot be a template.
template <typename T>
[[gnu::always_inline]] inline void add_columns(Compute<T>* __restrict sum, const T* __restrict row,
                                               int64_t count) {
  for (int64_t d = 0; d < count; ++d) sum[d] += static_cast<Compute<T>>(row[d]);
}
template <typename T>
[[gnu::always_inline]] inline void write_columns(T* __restrict row,
                                                 const Compute<T>* __restrict sum, int64_t count) {
  for (int64_t d = 0; d < count; ++d) row[d] = static_cast<T>(sum[d]);
}

CALM_MULTIVERSION void add(float* sum, const float* row, int64_t n) { add_columns(sum, row, n); }
CALM_MULTIVERSION void add(double* sum, const double* row, int64_t n) { add_columns(sum, row, n); }
CALM_MULTIVERSION void add(float* sum, const BFloat16* row, int64_t n) { add_columns(sum, row, n); }
CALM_MULTIVERSION void add(float* sum, const Half* row, int64_t n) { add_columns(sum, row, n); }
CALM_MULTIVERSION void write(BFloat16* row, const float* sum, int64_t n) {
  write_columns(row, sum, n);
}
CALM_MULTIVERSION void write(Half* row, const float* sum, int64_t n) { write_columns(row, sum, n); }
template <typename T>
void write(T* row, const T* sum, int64_t n) {
  std::copy_n(sum, n, row);
}

// The first id found outside the vocabulary, for the message once the loop is over.
class OutOfRange {
 public:
  bool holds(int64_t id, int64_t vocab_size) {
    if (static_cast<uint64_t>(id) < static_cast<uint64_t>(vocab_size)) return false;
    found_.store(true, std::memory_order_relaxed);
    id_.store(id, std::memory_order_relaxed);
    return true;
  }
  void check(int64_t vocab_size) const {
    STD_TORCH_CHECK(!found_.load(), "ids: expected token ids in [0, ", vocab_size,
                    "), the rows of the table; got ", id_.load());
  }
  // Row 0 stands in for a row that is not there until the loop is over, so it has to exist.
  static void check_not_empty(int64_t vocab_size, int64_t num_patches) {
    STD_TORCH_CHECK(vocab_size > 0 || num_patches == 0, "ids: the table has no rows");
  }

 private:
  std::atomic<bool> found_{false};
  std::atomic<int64_t> id_{0};
};

// Calls function(const Id*) for ids of either width.
template <typename Function>
void dispatch_ids(const Tensor& ids, const Function& function) {
  if (ids.scalar_type() == ScalarType::Long) {
    function(ids.const_data_ptr<int64_t>());
  } else {
    function(ids.const_data_ptr<int32_t>());
  }
}

std::tuple<Tensor, Tensor> embed_flatten(const Tensor& ids_in, const Tensor& embedding_in,
                                         double dropout, const std::optional<Tensor>& seed) {
  const Tensor ids = torch::stable::contiguous(ids_in);
  const Tensor embedding = torch::stable::contiguous(embedding_in);
  const int64_t num_patches = ids.size(0);
  const int64_t patch_size = ids.size(1);
  const int64_t vocab_size = embedding.size(0);
  Tensor flat = torch::stable::new_empty(embedding, {num_patches, patch_size * embedding.size(1)});
  Tensor used_ids = torch::stable::new_empty(ids, {num_patches, patch_size}, ScalarType::Long);
  const int64_t bytes = embedding.size(1) * static_cast<int64_t>(embedding.element_size());
  const char* table = static_cast<const char*>(embedding.const_data_ptr());
  char* out = static_cast<char*>(flat.mutable_data_ptr());
  int64_t* used = used_ids.mutable_data_ptr<int64_t>();
  const TokenDropout drop{
      dropout > 0.0 && seed.has_value() ? seed->const_data_ptr<int64_t>() : nullptr,
      static_cast<float>(dropout)};
  OutOfRange::check_not_empty(vocab_size, num_patches);
  OutOfRange outside;
  dispatch_ids(ids, [&](const auto* id) {
    // First which rows, then the rows: so the addresses are there ahead of the copies.
    const auto copy = [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) {
        for (int64_t k = 0; k < patch_size; ++k) {
          const int64_t t = p * patch_size + k;
          const auto token = static_cast<int64_t>(id[t]);
          used[t] = outside.holds(token, vocab_size) || drop.drops(p, k) ? 0 : token;
        }
      }
      const int64_t last = end * patch_size;
      for (int64_t t = begin * patch_size; t < last; ++t) {
        const int64_t ahead = t + kPatchesAhead * patch_size;
        if (ahead < last) prefetch_row(table + used[ahead] * bytes, bytes);
        std::memcpy(out + t * bytes, table + used[t] * bytes, static_cast<size_t>(bytes));
      }
    };
    torch::stable::parallel_for(0, num_patches, grain(patch_size * bytes), copy);
  });
  outside.check(vocab_size);
  return {flat, used_ids};
}

// Tokens in the order of their ids, equal ids in the order of their places.
struct SortedTokens {
  std::vector<int64_t> id;
  std::vector<int64_t> token;

  SortedTokens(const int64_t* ids, int64_t count, int64_t vocab_size)
      : id(static_cast<size_t>(count)), token(static_cast<size_t>(count)) {
    std::vector<int64_t> next(static_cast<size_t>(vocab_size) + 1, 0);
    for (int64_t t = 0; t < count; ++t) ++next[static_cast<size_t>(ids[t]) + 1];
    for (size_t v = 1; v < next.size(); ++v) next[v] += next[v - 1];
    for (int64_t t = 0; t < count; ++t) {
      const auto place = static_cast<size_t>(next[static_cast<size_t>(ids[t])]++);
      id[place] = ids[t];
      token[place] = t;
    }
  }

  int64_t count() const { return static_cast<int64_t>(id.size()); }
  // Whether the id at a place is also that of the place before.
  bool continues(int64_t place) const {
    return place > 0 && place < count() && id[static_cast<size_t>(place)] == id[place - 1];
  }
};

// The sum that a tile leaves to be added up: of its first id, if that began before or goes on past
// the whole tile ("head"), and of its last one, if that began here and goes on ("tail").
template <typename Sum>
struct TileSums {
  int64_t width;
  std::vector<Sum> sums;

  TileSums(int64_t tiles, int64_t width_) : width(width_), sums(2 * tiles * width_) {}
  Sum* head(int64_t tile) { return sums.data() + 2 * tile * width; }
  Sum* tail(int64_t tile) { return head(tile) + width; }
};

template <typename T>
void sum_tile(const SortedTokens& sorted, const T* grad_flat, int64_t tile,
              TileSums<Compute<T>>& partial, std::vector<Compute<T>>& sum, T* grad) {
  const int64_t width = partial.width;
  const int64_t begin = tile * kTileTokens;
  const int64_t end = std::min(begin + kTileTokens, sorted.count());
  for (int64_t first = begin; first < end;) {
    std::fill(sum.begin(), sum.end(), Compute<T>(0));
    int64_t place = first;
    do {
      const int64_t ahead = std::min(place + kRowsAhead, sorted.count() - 1);
      prefetch_row(reinterpret_cast<const char*>(grad_flat + sorted.token[ahead] * width),
                   width * static_cast<int64_t>(sizeof(T)));
      add(sum.data(), grad_flat + sorted.token[place] * width, width);
    } while (++place < end && sorted.continues(place));
    if (first == begin && sorted.continues(first)) {
      std::copy(sum.begin(), sum.end(), partial.head(tile));
    } else if (place == end && sorted.continues(end)) {
      std::copy(sum.begin(), sum.end(), partial.tail(tile));
    } else {
      write(grad + sorted.id[first] * width, sum.data(), width);
    }
    first = place;
  }
}

// Adds up the id whose first token lies in a tile and whose last does not, if there is one.
template <typename T>
void join_tiles(const SortedTokens& sorted, int64_t tile, TileSums<Compute<T>>& partial, T* grad) {
  const int64_t next = (tile + 1) * kTileTokens;
  if (!sorted.continues(next)) return;
  const int64_t id = sorted.id[next];
  const int64_t begin = tile * kTileTokens;
  if (sorted.id[begin] == id && sorted.continues(begin)) return;
  Compute<T>* sum = partial.tail(tile);
  for (int64_t place = next; place < sorted.count() && sorted.id[place] == id;
       place += kTileTokens) {
    const Compute<T>* head = partial.head(place / kTileTokens);
    for (int64_t d = 0; d < partial.width; ++d) sum[d] += head[d];
  }
  write(grad + id * partial.width, sum, partial.width);
}

Tensor embed_flatten_backward(const Tensor& grad_flat_in, const Tensor& used_ids_in,
                              int64_t vocab_size) {
  const Tensor grad_flat = torch::stable::contiguous(grad_flat_in);
  const Tensor used_ids = torch::stable::contiguous(used_ids_in);
  const int64_t width = grad_flat.size(1) / used_ids.size(1);
  Tensor grad = torch::stable::new_empty(grad_flat, {vocab_size, width});
  const int64_t* ids = used_ids.const_data_ptr<int64_t>();
  const int64_t count = used_ids.numel();
  OutOfRange outside;
  for (int64_t t = 0; t < count; ++t) outside.holds(ids[t], vocab_size);
  outside.check(vocab_size);
  const SortedTokens sorted(ids, count, vocab_size);
  const int64_t tiles = (count + kTileTokens - 1) / kTileTokens;
  dispatch_floating(grad_flat.scalar_type(), [&]<typename T>() {
    const T* rows = grad_flat.const_data_ptr<T>();
    T* out = grad.mutable_data_ptr<T>();
    const int64_t bytes = width * static_cast<int64_t>(sizeof(T));
    torch::stable::parallel_for(0, vocab_size, grain(bytes), [&](int64_t begin, int64_t end) {
      std::memset(static_cast<void*>(out + begin * width), 0,
                  static_cast<size_t>((end - begin) * bytes));
    });
    TileSums<Compute<T>> partial(tiles, width);
    const int64_t tile_grain = grain(kTileTokens * bytes);
    torch::stable::parallel_for(0, tiles, tile_grain, [&](int64_t begin, int64_t end) {
      std::vector<Compute<T>> sum(static_cast<size_t>(width));
      for (int64_t tile = begin; tile < end; ++tile) {
        sum_tile(sorted, rows, tile, partial, sum, out);
      }
    });
    torch::stable::parallel_for(0, tiles, tile_grain, [&](int64_t begin, int64_t end) {
      for (int64_t tile = begin; tile < end; ++tile) join_tiles(sorted, tile, partial, out);
    });
  });
  return grad;
}

// One patch: bias + sum_k rows[k], `kColumns` at a time.
template <typename T>
void sum_rows(const T* bias, const std::vector<const T*>& rows, int64_t width, T* out) {
  Compute<T> sum[kColumns];
  for (int64_t d = 0; d < width; d += kColumns) {
    const int64_t count = std::min(kColumns, width - d);
    for (int64_t i = 0; i < count; ++i) sum[i] = static_cast<Compute<T>>(bias[d + i]);
    for (const T* row : rows) add(sum, row + d, count);
    write(out + d, sum, count);
  }
}

Tensor folded_squeezed_gather(const Tensor& ids_in, const Tensor& tables_in,
                              const Tensor& bias_in) {
  const Tensor ids = torch::stable::contiguous(ids_in);
  const Tensor tables = torch::stable::contiguous(tables_in);
  const Tensor bias = torch::stable::contiguous(bias_in);
  const int64_t num_patches = ids.size(0);
  const int64_t patch_size = ids.size(1);
  const int64_t vocab_size = tables.size(1);
  const int64_t width = tables.size(2);
  Tensor out = torch::stable::new_empty(tables, {num_patches, width});
  OutOfRange::check_not_empty(vocab_size, num_patches);
  OutOfRange outside;
  dispatch_floating(tables.scalar_type(), [&]<typename T>() {
    const T* table = tables.const_data_ptr<T>();
    const T* bias_row = bias.const_data_ptr<T>();
    T* result = out.mutable_data_ptr<T>();
    const int64_t bytes = width * static_cast<int64_t>(sizeof(T));
    dispatch_ids(ids, [&](const auto* id) {
      const auto row_of = [&](int64_t p, int64_t k) {
        const auto token = static_cast<int64_t>(id[p * patch_size + k]);
        const int64_t row = outside.holds(token, vocab_size) ? 0 : token;
        return table + (k * vocab_size + row) * width;
      };
      const auto sum = [&](int64_t begin, int64_t end) {
        std::vector<const T*> rows(static_cast<size_t>(patch_size));
        for (int64_t p = begin; p < end; ++p) {
          for (int64_t k = 0; k < patch_size; ++k) {
            rows[static_cast<size_t>(k)] = row_of(p, k);
            if (p + kPatchesAhead >= end) continue;
            prefetch_row(reinterpret_cast<const char*>(row_of(p + kPatchesAhead, k)), bytes);
          }
          sum_rows(bias_row, rows, width, result + p * width);
        }
      };
      torch::stable::parallel_for(0, num_patches, grain(patch_size * bytes), sum);
    });
  });
  outside.check(vocab_size);
  return out;
}

}  // namespace
}  // namespace calm

STABLE_TORCH_LIBRARY_IMPL(calm_kernels, CPU, m) {
  m.impl("embed_flatten", TORCH_BOX(&calm::embed_flatten));
  m.impl("embed_flatten_backward", TORCH_BOX(&calm::embed_flatten_backward));
  m.impl("folded_squeezed_gather", TORCH_BOX(&calm::folded_squeezed_gather));
}
