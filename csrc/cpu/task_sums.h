// Column sums that tasks made apart.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace calm {

// to[i] = the sum, in T, of parts[task * stride + i], added in the order of the tasks.
template <typename T, typename Part, typename S>
void add_tasks_in(const Part* parts, int64_t num_tasks, int64_t stride, int64_t count, S* to) {
  std::vector<T> totals(static_cast<size_t>(count));
  T* const total = totals.data();
  for (int64_t task = 0; task < num_tasks; ++task) {
    const Part* const part = parts + task * stride;
    for (int64_t i = 0; i < count; ++i) total[i] += part[i];
  }
  std::transform(totals.begin(), totals.end(), to, [](T value) { return static_cast<S>(value); });
}

template <typename T, typename S>
void add_tasks(const T* parts, int64_t num_tasks, int64_t stride, int64_t count, S* to) {
  add_tasks_in<T>(parts, num_tasks, stride, count, to);
}

}  // namespace calm
