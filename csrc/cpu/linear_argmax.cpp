// Largest output of a linear layer and its index, on CPUs, without the logits.
//
// The logits are made a tile at a time by torch's matmul and reduced while they are in the cache.
// Each tile is the work of one thread, matmul and all; tiles are cut by the shapes alone, so any
// number of threads gives the same bits. A thread walks a range of tiles, row blocks outermost,
// with the best of each row so far beside it, and joins them with the others' at the end of a row
// block. The last tile of a row block overlaps the one before it, which a small vocabulary (bytes)
// would pay twice over: in float32 it goes through the library's own product, where that serves.
//
// Fewest bytes: hidden and weight read once, 12 bytes a row written; 2 R V H operations, so from a
// few rows on the matmul is the limit. Storing all logits adds 4 R V bytes written and read, a
// matmul that misses the cache with its results, and a second pass: half the time of the plain
// formulation at R = 800, V = 128257, H = 512. Temporary memory: a tile of logits a thread; widened
// copies (below) of hidden, and of a tile of the weight a thread.
//
// bfloat16. torch's matmul rounds its float32 sums to bfloat16. Rounding is monotonic: the largest
// sum has the largest rounded sum, so it is among the columns whose rounded sum EQUALS the row's
// largest. These few (one to three as a rule) are compared by float32 dot products, all in one
// order of summation, so that columns which are equal tie exactly and the lowest index stays. A row
// that is all ties, zeros say, costs a dot product a column and is as right. Rounding keeps NaN and
// makes no new one; what it rounds to infinity ties there and is told apart by the dot products.
// Two sums that differ by less than the rounding of a float32 sum may be told apart the other way,
// as any other order of summation may. Where the machine has no bfloat16 dot product, or there is a
// bias (which is not monotonic after the rounding), or the operands are float16 (slow in torch's
// matmul), the operands are widened to float32, which is exact, and the float32 matmul serves.

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <algorithm>
#include <mutex>
#include <type_traits>
#include <vector>

#include "cpu/linear_argmax_scan.h"
#include "cpu/registration.h"
#include "cpu/sgemm.h"

namespace calm {
namespace {

// A tile of logits: 800 KiB in float32, about the L2 cache of a core. At 800 rows, V = 128257 and
// H = 512, tiles of half and of twice the rows or columns were within 6% in float32 and bfloat16.
constexpr int64_t kRowsPerTile = 400;
constexpr int64_t kColumnsPerTile = 512;
// With few rows wider tiles keep the number of matmuls down.
constexpr int64_t kMostColumnsPerTile = 2048;
// A matmul's last few columns may be summed in another order than the others.
constexpr int64_t kColumnUnit = 64;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A part of the logits.
struct Tile {
  int64_t row;
  int64_t rows;
  int64_t column;
  int64_t columns;
};

// How the logits are cut: blocks of rows outermost. Tiles have whole units of columns, and the last
// one of a block overlaps the one before it, so that every logit of a row is summed alike and what
// is equal ties.
struct Tiling {
  int64_t rows;
  int64_t vocab;
  int64_t rows_per_tile;
  int64_t columns_per_tile;
  int64_t column_tiles;
  int64_t num_tiles;

  Tiling(int64_t num_rows, int64_t vocab_size) : rows(num_rows), vocab(vocab_size) {
    const int64_t row_tiles = divide_up(rows, kRowsPerTile);
    rows_per_tile = divide_up(rows, row_tiles);
    const int64_t columns = kRowsPerTile / rows_per_tile * kColumnsPerTile;
    const int64_t whole = vocab < kColumnUnit ? vocab : vocab / kColumnUnit * kColumnUnit;
    columns_per_tile = std::min({columns, kMostColumnsPerTile, whole});
    column_tiles = divide_up(vocab, columns_per_tile);
    num_tiles = row_tiles * column_tiles;
  }

  Tile tile(int64_t i) const {
    const int64_t row = i / column_tiles * rows_per_tile;
    const int64_t column = i % column_tiles * columns_per_tile;
    return {row, std::min(rows_per_tile, rows - row), std::min(column, vocab - columns_per_tile),
            columns_per_tile};
  }
};

Tensor matrix(const void* data, int64_t rows, int64_t columns, int64_t row_stride,
              int64_t column_stride, ScalarType dtype) {
  return torch::stable::from_blob(const_cast<void*>(data), {rows, columns},
                                  {row_stride, column_stride},
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU), dtype);
}

// Rows of `size` numbers, `stride` apart.
template <typename T>
struct Rows {
  const T* data;
  int64_t stride;
  int64_t size;

  Rows from(int64_t i) const { return {data + i * stride, stride, size}; }
};

// logits [rows, columns] = hidden [rows, size] times weight [columns, size] transposed. The CPU's
// kernel is called as such: a thread of the pool has no dispatcher state of its caller's.
template <typename T>
void multiply(const Rows<T>& hidden, int64_t rows, const Rows<T>& weight, int64_t columns,
              ScalarType dtype, T* logits) {
  const Tensor out = matrix(logits, rows, columns, columns, 1, dtype);
  const Tensor left = matrix(hidden.data, rows, hidden.size, hidden.stride, 1, dtype);
  const Tensor right = matrix(weight.data, weight.size, columns, 1, weight.stride, dtype);
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), left.get(), right.get()));
}

// Best of rows, joined from the threads.
template <typename T>
class Bests {
 public:
  explicit Bests(int64_t rows) : best_(static_cast<size_t>(rows), kNone) {}

  static constexpr Best<T> kNone{0, 0, -1};

  void join(int64_t first, const std::vector<Best<T>>& found) {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (size_t i = 0; i < found.size(); ++i) {
      Best<T>& so_far = best_[static_cast<size_t>(first) + i];
      if (goes_before(found[i], so_far)) so_far = found[i];
    }
  }

  void write(int64_t* index, T* value) const {
    for (size_t i = 0; i < best_.size(); ++i) {
      index[i] = best_[i].index;
      value[i] = best_[i].value;
    }
  }

 private:
  std::mutex mutex_;
  std::vector<Best<T>> best_;
};

// Three ways to make a tile of logits and to take it into account; each thread has its own.

// Operands of float32 or float64.
template <typename T>
class Direct {
 public:
  using Logit = T;
  using Result = T;

  Direct(const Rows<T>& hidden, const Rows<T>& weight, const T* bias)
      : hidden_(hidden), weight_(weight), bias_(bias) {}

  void scan(const Tile& at, T* logits, Best<T>* best) const {
    multiply<T>(hidden_.from(at.row), at.rows, weight_.from(at.column), at.columns, kDtype, logits);
    scan_tile({logits, at.rows, at.columns, at.column},
              bias_ == nullptr ? nullptr : bias_ + at.column, best);
  }

 private:
  static constexpr ScalarType kDtype =
      std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float;
  Rows<T> hidden_;
  Rows<T> weight_;
  const T* bias_;
};

// bfloat16 operands and logits.
class Rounded {
 public:
  using Logit = uint16_t;
  using Result = float;

  Rounded(const Rows<uint16_t>& hidden, const Rows<uint16_t>& weight)
      : hidden_(hidden), weight_(weight) {}

  void scan(const Tile& at, uint16_t* logits, Best<float>* best) const {
    const Rows<uint16_t> hidden = hidden_.from(at.row);
    const Rows<uint16_t> weight = weight_.from(at.column);
    multiply(hidden, at.rows, weight, at.columns, ScalarType::BFloat16, logits);
    scan_rounded_tile({logits, at.rows, at.columns, at.column},
                      {hidden.data, weight.data, weight.stride, weight.size}, best);
  }

 private:
  Rows<uint16_t> hidden_;
  Rows<uint16_t> weight_;
};

using Widen = void (*)(const uint16_t* source, int64_t count, float* target);

// 16-bit weight, widened a tile at a time; hidden and bias were widened before.
class Widened {
 public:
  using Logit = float;
  using Result = float;

  Widened(const Rows<float>& hidden, const Rows<uint16_t>& weight, const float* bias, Widen widen)
      : hidden_(hidden), weight_(weight), bias_(bias), widen_(widen) {}

  void scan(const Tile& at, float* logits, Best<float>* best) {
    widened_.resize(static_cast<size_t>(at.columns * weight_.size));
    for (int64_t c = 0; c < at.columns; ++c) {
      widen_(weight_.from(at.column + c).data, weight_.size, widened_.data() + c * weight_.size);
    }
    const Rows<float> weight{widened_.data(), weight_.size, weight_.size};
    multiply(hidden_.from(at.row), at.rows, weight, at.columns, ScalarType::Float, logits);
    scan_tile({logits, at.rows, at.columns, at.column},
              bias_ == nullptr ? nullptr : bias_ + at.column, best);
  }

 private:
  Rows<float> hidden_;
  Rows<uint16_t> weight_;
  const float* bias_;
  Widen widen_;
  std::vector<float> widened_;
};

template <typename Way>
void run(const Way& way, const Tiling& tiling, int64_t* index, typename Way::Result* value) {
  using Result = typename Way::Result;
  Bests<Result> bests(tiling.rows);
  // Two tasks at least: a single one would leave the pool to the matmul, and its sums to the number
  // of threads.
  const int64_t num_tasks = std::max<int64_t>(2, tiling.num_tiles);
  torch::stable::parallel_for(0, num_tasks, 1, [&](int64_t begin, int64_t end) {
    end = std::min(end, tiling.num_tiles);
    if (begin >= end) return;
    Way mine = way;
    std::vector<typename Way::Logit> logits(
        static_cast<size_t>(tiling.rows_per_tile * tiling.columns_per_tile));
    std::vector<Best<Result>> found;
    for (int64_t i = begin; i < end; ++i) {
      const Tile at = tiling.tile(i);
      if (i == begin || at.column == 0) {
        found.assign(static_cast<size_t>(at.rows), Bests<Result>::kNone);
      }
      mine.scan(at, logits.data(), found.data());
      if (i + 1 == end || at.column + at.columns == tiling.vocab) bests.join(at.row, found);
    }
  });
  bests.write(index, value);
}

// A small vocabulary is multiplied whole, packed once for all threads, a block of rows at a time.
constexpr int64_t kMostPackedColumns = 2048;
constexpr int64_t kFewestPackedRows = 32;
constexpr int64_t kPackedRowsPerTask = 128;

void run_packed(const Rows<float>& hidden, int64_t num_rows, const Rows<float>& weight,
                int64_t vocab, const float* bias, int64_t* index, float* value) {
  PackedRight packed;
  packed.pack({weight.data, weight.size, vocab, 1, weight.stride});
  const int64_t per_task =
      std::min(kPackedRowsPerTask, divide_up(num_rows, int64_t{torch::stable::get_num_threads()}));
  torch::stable::parallel_for(0, divide_up(num_rows, per_task), 1, [&](int64_t begin, int64_t end) {
    ReusedMemory<float> left;
    std::vector<float> logits(static_cast<size_t>(per_task * vocab));
    std::vector<Best<float>> best;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task * per_task;
      const int64_t rows = std::min(per_task, num_rows - first);
      sgemm({logits.data(), rows, vocab, vocab}, nullptr,
            {hidden.from(first).data, rows, hidden.size, hidden.stride}, packed, left);
      best.assign(static_cast<size_t>(rows), Bests<float>::kNone);
      scan_tile({logits.data(), rows, vocab, 0}, bias, best.data());
      for (int64_t r = 0; r < rows; ++r) {
        index[first + r] = best[static_cast<size_t>(r)].index;
        value[first + r] = best[static_cast<size_t>(r)].value;
      }
    }
  });
}

// Whether torch's matmul has an instruction for bfloat16; where it has none it is slower than
// float32's.
bool has_bfloat16_products() {
#if defined(__x86_64__) && defined(__GNUC__)
  return __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

template <typename T>
Rows<T> rows_of(const Tensor& tensor) {
  return {static_cast<const T*>(tensor.const_data_ptr()), tensor.stride(0), tensor.size(1)};
}

template <typename T>
const T* data_of(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<const T*>(tensor->const_data_ptr()) : nullptr;
}

void run_widened(const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& bias,
                 const Tiling& tiling, int64_t* index, float* value) {
  const Widen widen = hidden.scalar_type() == ScalarType::Half ? widen_half : widen_bfloat16;
  const Rows<uint16_t> narrow = rows_of<uint16_t>(hidden);
  std::vector<float> wide_hidden(static_cast<size_t>(tiling.rows * narrow.size));
  widen(narrow.data, tiling.rows * narrow.size, wide_hidden.data());
  std::vector<float> wide_bias(bias ? static_cast<size_t>(tiling.vocab) : 0);
  if (bias) widen(data_of<uint16_t>(bias), tiling.vocab, wide_bias.data());
  const Rows<float> rows{wide_hidden.data(), narrow.size, narrow.size};
  run(Widened(rows, rows_of<uint16_t>(weight), bias ? wide_bias.data() : nullptr, widen), tiling,
      index, value);
}

std::tuple<Tensor, Tensor> linear_argmax(const Tensor& hidden_in, const Tensor& weight_in,
                                         const std::optional<Tensor>& bias_in) {
  const Tensor hidden = torch::stable::contiguous(hidden_in);
  const bool has_rows = weight_in.size(1) <= 1 || weight_in.stride(1) == 1;
  const Tensor weight = has_rows ? weight_in : torch::stable::contiguous(weight_in);
  std::optional<Tensor> bias;
  if (bias_in) bias = torch::stable::contiguous(*bias_in);
  const int64_t num_rows = hidden.size(0);
  const ScalarType dtype = hidden.scalar_type();
  const bool is_double = dtype == ScalarType::Double;
  Tensor index = torch::stable::new_empty(hidden, {num_rows}, ScalarType::Long);
  Tensor value = torch::stable::new_empty(hidden, {num_rows},
                                          is_double ? ScalarType::Double : ScalarType::Float);
  if (num_rows == 0) return {index, value};
  const Tiling tiling(num_rows, weight.size(0));
  int64_t* indices = index.mutable_data_ptr<int64_t>();
  const auto direct = [&]<typename T>(T* values) {
    run(Direct<T>(rows_of<T>(hidden), rows_of<T>(weight), data_of<T>(bias)), tiling, indices,
        values);
  };
  if (is_double) {
    direct(value.mutable_data_ptr<double>());
  } else if (dtype == ScalarType::Float && tiling.vocab <= kMostPackedColumns &&
             num_rows >= kFewestPackedRows && sgemm_serves()) {
    run_packed(rows_of<float>(hidden), num_rows, rows_of<float>(weight), tiling.vocab,
               data_of<float>(bias), indices, value.mutable_data_ptr<float>());
  } else if (dtype == ScalarType::Float) {
    direct(value.mutable_data_ptr<float>());
  } else if (dtype == ScalarType::BFloat16 && !bias && has_bfloat16_products()) {
    run(Rounded(rows_of<uint16_t>(hidden), rows_of<uint16_t>(weight)), tiling, indices,
        value.mutable_data_ptr<float>());
  } else {
    run_widened(hidden, weight, bias, tiling, indices, value.mutable_data_ptr<float>());
  }
  return {index, value};
}

}  // namespace
}  // namespace calm

STABLE_TORCH_LIBRARY_IMPL(calm_kernels, CPU, m) {
  m.impl("linear_argmax", TORCH_BOX(&calm::linear_argmax));
}
