// The vocabulary head on CPUs: logits of some rows at a time in one buffer, and gradients from it.
//
// A *slot* is a place for a row: its logits, which become exponentials and then residuals, and its
// hidden state in the compute type. Rows enter the slots behind the dense rows that wait there;
// sparse rows give their gradients at once and leave; when little room is left, the matmuls of the
// backward run over all waiting rows together.
//
// Matmuls are torch's, one vocabulary tile to a task; where the whole weight is no larger than a
// tile, logits and hidden gradients are split by rows instead: sums over a fraction of a small
// vocabulary would be short. Tiles, pieces and the order of every sum depend on the shapes alone,
// so results are the same bits for any number of threads.
#pragma once

#include <cstring>
#include <vector>

#include "cpu/linear_cross_entropy_rows.h"
#include "cpu/matmul.h"

namespace calm {

// Of a tile of the weight: 512 KiB in float32, half of a common L2. Of 256 to 4096 rows (H=256) a
// matmul of 96 rows ran at 59, 56, 56, 52 and 45 GFLOP/s.
constexpr int64_t kTileElements = 1 << 17;
constexpr int64_t kSmallestTile = 16;
constexpr int64_t kTasks = 8;  // tiles or pieces, and partial sums of the hidden gradient

// Slots fill this many values, 6.25 MiB in float32, but are never fewer than kFewestSlots: below
// that, matmuls wait for the weight.
constexpr int64_t kSlotValues = 25 << 16;
constexpr int64_t kFewestSlots = 64;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct HeadShape {
  int64_t vocab_size;
  int64_t hidden_size;
  int64_t padded;  // a row of logits
  int64_t tile;    // vocabulary rows
  int64_t num_tiles;
  bool by_rows;       // one tile of this size holds the weight
  int64_t num_parts;  // partial sums of the hidden gradient

  HeadShape(int64_t vocab_size, int64_t hidden_size)
      : vocab_size(vocab_size),
        hidden_size(hidden_size),
        padded(ceil_div(vocab_size, kRowLanes) * kRowLanes) {
    const int64_t shared = ceil_div(ceil_div(vocab_size, kTasks), kSmallestTile) * kSmallestTile;
    const int64_t cached = kTileElements / std::max<int64_t>(hidden_size, 1);
    tile = std::max(kSmallestTile, std::min(cached / kSmallestTile * kSmallestTile, shared));
    num_tiles = ceil_div(vocab_size, tile);
    by_rows = vocab_size <= cached;
    num_parts = by_rows ? 1 : std::min(num_tiles, kTasks);
  }

  // The same with one tile.
  HeadShape whole() const {
    HeadShape shape = *this;
    shape.tile = vocab_size;
    shape.num_tiles = 1;
    return shape;
  }

  int64_t slots_for(int64_t num_rows) const {
    const int64_t values = padded + (num_parts + 1) * hidden_size;
    return std::min(num_rows, std::max(kFewestSlots, kSlotValues / values));
  }
};

// Where gradients are added up; null where not wanted.
template <typename T>
struct HeadGradients {
  T* hidden;  // [R, H], written row by row
  T* weight;  // [V, H]
  T* bias;    // [V]

  bool any() const { return hidden != nullptr || weight != nullptr || bias != nullptr; }
};

template <typename T, typename In>
class VocabularyHead {
 public:
  VocabularyHead(const HeadShape& shape, const In* hidden, const In* weight, const In* bias,
                 const HeadGradients<T>& gradients, bool has_lists, int64_t num_rows)
      : shape_(shape),
        whole_(shape.whole()),
        hidden_(hidden),
        weight_(weight),
        gradients_(gradients),
        num_slots_(shape.slots_for(num_rows)),
        logits_(num_slots_ * shape.padded),
        packed_(num_slots_ * shape.hidden_size),
        parts_(gradients.hidden != nullptr ? shape.num_parts * num_slots_ * shape.hidden_size : 0),
        bias_(bias != nullptr ? shape.padded : 0),
        row_of_slot_(num_slots_),
        is_dense_(num_slots_),
        lengths_(num_slots_) {
    if (bias != nullptr) {
      std::fill_n(bias_.get(), shape.padded, T(0));
      for (int64_t v = 0; v < shape.vocab_size; ++v) bias_.get()[v] = static_cast<T>(bias[v]);
      has_bias_ = true;
    }
    if (has_lists) {
      columns_.resize(num_slots_ * kListCapacity);
      factors_.resize(num_slots_ * kListCapacity);
      first_of_column_.resize(shape.vocab_size + 1);
      // Lists may come before the first matmul, and touch few rows.
      if (gradients.weight != nullptr) {
        std::fill_n(gradients.weight, shape.vocab_size * shape.hidden_size, T(0));
      }
    }
    starts_empty_ = !has_lists;
    if (gradients.bias != nullptr) std::fill_n(gradients.bias, shape.vocab_size, T(0));
  }

  T* logits(int64_t slot) const { return logits_.get() + slot * shape_.padded; }
  const T* bias() const { return has_bias_ ? bias_.get() : nullptr; }
  int64_t row(int64_t slot) const { return row_of_slot_[slot]; }
  int32_t* columns(int64_t slot) { return columns_.data() + slot * kListCapacity; }
  T* factors(int64_t slot) { return factors_.data() + slot * kListCapacity; }

  // A slot's list entry is a share of the gradient of one logit.
  void set_sparse(int64_t slot, int64_t length) {
    lengths_[slot] = static_cast<int32_t>(length);
    is_dense_[slot] = false;
  }
  void set_dense(int64_t slot) { is_dense_[slot] = true; }

  int64_t first_free() const { return num_waiting_; }
  int64_t num_free() const { return num_slots_ - num_waiting_; }

  // Rows into the free slots; returns the end of those taken.
  int64_t take(const int64_t* rows, int64_t count) {
    const int64_t begin = num_waiting_;
    std::copy_n(rows, count, row_of_slot_.begin() + begin);
    const int64_t size = shape_.hidden_size;
    torch::stable::parallel_for(0, count, 64, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const In* source = hidden_ + rows[i] * size;
        T* to = packed_.get() + (begin + i) * size;
        for (int64_t k = 0; k < size; ++k) to[k] = static_cast<T>(source[k]);
      }
    });
    return begin + count;
  }

  void make_logits(int64_t begin, int64_t end) {
    if (shape_.by_rows) {
      for_tasks(kTasks, [&](int64_t first, int64_t last) {
        Tile scratch(whole_);
        const Matrix<const T> weight = scratch.load(weight_, 0);
        for (int64_t task = first; task < last; ++task) {
          const auto [from, to] = piece(begin, end, task);
          if (from == to) continue;
          const Matrix<T> out{logits(from), to - from, shape_.vocab_size, shape_.padded};
          multiply<T>(out, packed(from, to), weight.transposed(), false);
        }
      });
      return;
    }
    const Matrix<const T> rows = packed(begin, end);
    for_tasks(shape_.num_tiles, [&](int64_t first, int64_t last) {
      Tile scratch(shape_);
      for (int64_t t = first; t < last; ++t) {
        const Matrix<const T> weight = scratch.load(weight_, t);
        multiply<T>(residuals(begin, end, t), rows, weight.transposed(), false);
      }
    });
  }

  // The hidden gradient of a sparse slot, from its list.
  void add_list_to_hidden(int64_t slot) {
    if (gradients_.hidden == nullptr) return;
    const int64_t size = shape_.hidden_size;
    T* out = gradients_.hidden + row_of_slot_[slot] * size;
    std::fill_n(out, size, T(0));
    const int32_t* column = columns(slot);
    const T* factor = factors(slot);
    for (int32_t i = 0; i < lengths_[slot]; ++i)
      add_row(out, weight_ + column[i] * size, factor[i]);
  }

  // The weight and bias gradients of the lists in [begin, end).
  void add_lists_to_weight(int64_t begin, int64_t end);

  // Dense rows of [begin, end) move up to those that wait; the matmuls run if room gets scarce.
  void keep_dense(int64_t begin, int64_t end);

  // The matmuls of all rows that wait.
  void flush();

  // After the last row.
  void finish() {
    flush();
    if (gradients_.weight != nullptr && starts_empty_) {
      std::fill_n(gradients_.weight, shape_.vocab_size * shape_.hidden_size, T(0));
    }
  }

 private:
  // A tile of the weight in the compute type: where it is, or converted.
  class Tile {
   public:
    explicit Tile(const HeadShape& shape)
        : shape_(shape), converted_(std::is_same_v<In, T> ? 0 : shape.tile * shape.hidden_size) {}

    Matrix<const T> load(const In* weight, int64_t tile) {
      const int64_t first = tile * shape_.tile;
      const int64_t rows = std::min(shape_.tile, shape_.vocab_size - first);
      const In* source = weight + first * shape_.hidden_size;
      if constexpr (std::is_same_v<In, T>) {
        return {source, rows, shape_.hidden_size, shape_.hidden_size};
      } else {
        const int64_t count = rows * shape_.hidden_size;
        for (int64_t i = 0; i < count; ++i) converted_.get()[i] = static_cast<T>(source[i]);
        return {converted_.get(), rows, shape_.hidden_size, shape_.hidden_size};
      }
    }

   private:
    const HeadShape& shape_;
    WorkingMemory<T> converted_;
  };

  struct Entry {
    int32_t column;
    int32_t slot;
    T factor;
  };

  Matrix<const T> packed(int64_t begin, int64_t end) const {
    const int64_t size = shape_.hidden_size;
    return {packed_.get() + begin * size, end - begin, size, size};
  }

  Matrix<T> residuals(int64_t begin, int64_t end, int64_t tile) const {
    const int64_t first = tile * shape_.tile;
    const int64_t columns = std::min(shape_.tile, shape_.vocab_size - first);
    return {logits(begin) + first, end - begin, columns, shape_.padded};
  }

  void add_row(T* out, const In* x, T factor) {
    if constexpr (std::is_same_v<In, T>) {
      add_scaled(out, x, factor, shape_.hidden_size);
    } else {
      for (int64_t k = 0; k < shape_.hidden_size; ++k) out[k] += factor * static_cast<T>(x[k]);
    }
  }

  void move_slot(int64_t from, int64_t to) {
    std::copy_n(logits(from), shape_.padded, logits(to));
    std::copy_n(packed_.get() + from * shape_.hidden_size, shape_.hidden_size,
                packed_.get() + to * shape_.hidden_size);
    row_of_slot_[to] = row_of_slot_[from];
  }

  // Piece `task` of kTasks of the slots [begin, end).
  static std::pair<int64_t, int64_t> piece(int64_t begin, int64_t end, int64_t task) {
    const int64_t size = ceil_div(end - begin, kTasks);
    const int64_t from = std::min(end, begin + task * size);
    return {from, std::min(end, from + size)};
  }

  // The share of a tile in the gradients of the waiting rows, and in those of weight and bias.
  void add_tile_to_hidden(Tile& scratch, int64_t tile, int64_t part, bool first_of_part);
  void add_tile_to_weight(int64_t tile);
  void flush_pieces();
  void flush_tiles();

  HeadShape shape_;
  HeadShape whole_;  // one tile
  const In* hidden_;
  const In* weight_;
  HeadGradients<T> gradients_;
  int64_t num_slots_;
  WorkingMemory<T> logits_;  // [slots, padded]
  WorkingMemory<T> packed_;  // [slots, H]
  WorkingMemory<T> parts_;   // [parts, slots, H]
  WorkingMemory<T> bias_;
  std::vector<int64_t> row_of_slot_;
  std::vector<char> is_dense_;
  std::vector<int32_t> lengths_;
  std::vector<int32_t> columns_;  // [slots, kListCapacity]
  std::vector<T> factors_;
  std::vector<int32_t> first_of_column_;
  std::vector<Entry> entries_;
  std::vector<std::pair<int64_t, int64_t>> moves_;
  int64_t num_waiting_ = 0;
  bool has_bias_ = false;
  bool starts_empty_ = true;  // the weight gradient has not been written yet
};

template <typename T, typename In>
void VocabularyHead<T, In>::add_lists_to_weight(int64_t begin, int64_t end) {
  if (gradients_.weight == nullptr && gradients_.bias == nullptr) return;
  // Sorted by column by counting; within a column in the order of slots.
  std::fill(first_of_column_.begin(), first_of_column_.end(), 0);
  int64_t total = 0;
  for (int64_t slot = begin; slot < end; ++slot) {
    if (is_dense_[slot]) continue;
    for (int32_t i = 0; i < lengths_[slot]; ++i) ++first_of_column_[columns(slot)[i] + 1];
    total += lengths_[slot];
  }
  for (size_t v = 1; v < first_of_column_.size(); ++v) {
    first_of_column_[v] += first_of_column_[v - 1];
  }
  entries_.resize(total);
  for (int64_t slot = begin; slot < end; ++slot) {
    if (is_dense_[slot]) continue;
    for (int32_t i = 0; i < lengths_[slot]; ++i) {
      const int32_t column = columns(slot)[i];
      entries_[first_of_column_[column]++] = {column, static_cast<int32_t>(slot), factors(slot)[i]};
    }
  }
  constexpr int64_t kGrainEntries = 64;
  const int64_t size = shape_.hidden_size;
  torch::stable::parallel_for(0, total, kGrainEntries, [&](int64_t first, int64_t last) {
    const auto continues = [&](int64_t i) {
      return i > 0 && i < total && entries_[i].column == entries_[i - 1].column;
    };
    // A column belongs to whoever has its first entry.
    while (first < last && continues(first)) ++first;
    if (first == last) return;
    while (continues(last)) ++last;
    for (int64_t i = first; i < last; ++i) {
      const auto& [column, slot, factor] = entries_[i];
      if (gradients_.weight != nullptr) {
        add_scaled(gradients_.weight + column * size, packed_.get() + slot * size, factor, size);
      }
      if (gradients_.bias != nullptr) gradients_.bias[column] += factor;
    }
  });
}

template <typename T, typename In>
void VocabularyHead<T, In>::keep_dense(int64_t begin, int64_t end) {
  int64_t num_dense = 0;
  for (int64_t slot = begin; slot < end; ++slot) num_dense += is_dense_[slot];
  num_waiting_ = begin + num_dense;
  // Rows past the new end move into the holes before it: no two moves touch.
  moves_.clear();
  int64_t hole = begin;
  for (int64_t slot = num_waiting_; slot < end; ++slot) {
    if (!is_dense_[slot]) continue;
    while (is_dense_[hole]) ++hole;
    moves_.emplace_back(slot, hole++);
  }
  torch::stable::parallel_for(0, static_cast<int64_t>(moves_.size()), 1,
                              [&](int64_t first, int64_t last) {
                                for (int64_t i = first; i < last; ++i) {
                                  move_slot(moves_[i].first, moves_[i].second);
                                }
                              });
  if (num_waiting_ > num_slots_ / 2) flush();
}

template <typename T, typename In>
void VocabularyHead<T, In>::add_tile_to_hidden(Tile& scratch, int64_t tile, int64_t part,
                                               bool first_of_part) {
  if (gradients_.hidden == nullptr) return;
  const int64_t size = shape_.hidden_size;
  T* sum = parts_.get() + part * num_slots_ * size;
  multiply<T>({sum, num_waiting_, size, size}, residuals(0, num_waiting_, tile).read_only(),
              scratch.load(weight_, tile), !first_of_part);
}

template <typename T, typename In>
void VocabularyHead<T, In>::add_tile_to_weight(int64_t tile) {
  const int64_t size = shape_.hidden_size;
  const Matrix<const T> values = residuals(0, num_waiting_, tile).read_only();
  const int64_t column = tile * shape_.tile;
  if (gradients_.weight != nullptr) {
    multiply<T>({gradients_.weight + column * size, values.columns, size, size},
                values.transposed(), packed(0, num_waiting_), !starts_empty_);
  }
  if (gradients_.bias != nullptr) {
    for (int64_t slot = 0; slot < num_waiting_; ++slot) {
      add_scaled(gradients_.bias + column, logits(slot) + column, T(1), values.columns);
    }
  }
}

template <typename T, typename In>
void VocabularyHead<T, In>::flush_tiles() {
  const int64_t parts = shape_.num_parts;
  for_tasks(parts, [&](int64_t first, int64_t last) {
    Tile scratch(shape_);
    for (int64_t part = first; part < last; ++part) {
      const int64_t begin = part * shape_.num_tiles / parts;
      const int64_t end = (part + 1) * shape_.num_tiles / parts;
      for (int64_t tile = begin; tile < end; ++tile) {
        add_tile_to_hidden(scratch, tile, part, tile == begin);
        add_tile_to_weight(tile);
      }
    }
  });
}

template <typename T, typename In>
void VocabularyHead<T, In>::flush_pieces() {
  const int64_t size = shape_.hidden_size;
  if (gradients_.hidden != nullptr) {
    for_tasks(kTasks, [&](int64_t first, int64_t last) {
      Tile scratch(whole_);
      const Matrix<const T> weight = scratch.load(weight_, 0);
      for (int64_t task = first; task < last; ++task) {
        const auto [from, to] = piece(0, num_waiting_, task);
        if (from == to) continue;
        const Matrix<const T> values{logits(from), to - from, shape_.vocab_size, shape_.padded};
        multiply<T>({parts_.get() + from * size, to - from, size, size}, values, weight, false);
      }
    });
  }
  for_tasks(shape_.num_tiles, [&](int64_t first, int64_t last) {
    for (int64_t tile = first; tile < last; ++tile) add_tile_to_weight(tile);
  });
}

template <typename T, typename In>
void VocabularyHead<T, In>::flush() {
  if (num_waiting_ == 0) return;
  const int64_t parts = shape_.num_parts;
  if (shape_.by_rows) {
    flush_pieces();
  } else {
    flush_tiles();
  }
  starts_empty_ = false;
  if (gradients_.hidden != nullptr) {
    const int64_t size = shape_.hidden_size;
    torch::stable::parallel_for(0, num_waiting_, 8, [&](int64_t first, int64_t last) {
      for (int64_t slot = first; slot < last; ++slot) {
        T* out = gradients_.hidden + row_of_slot_[slot] * size;
        std::copy_n(parts_.get() + slot * size, size, out);
        for (int64_t part = 1; part < parts; ++part) {
          add_scaled(out, parts_.get() + (part * num_slots_ + slot) * size, T(1), size);
        }
      }
    });
  }
  num_waiting_ = 0;
}

}  // namespace calm
