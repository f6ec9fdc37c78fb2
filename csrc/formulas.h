// Integers that follow from a call's counts, evaluated anew for each call.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <utility>
#include <vector>

namespace msd {

// Factors by variable. Variable 0 is 1, the counts follow, and then the result of each step.
using Terms = std::vector<std::pair<std::size_t, std::int64_t>>;

// Sums of terms, one after the other in memory.
class Sums {
 public:
  void add(const Terms& terms) {
    terms_.insert(terms_.end(), terms.begin(), terms.end());
    ends_.push_back(terms_.size());
  }

  std::size_t size() const { return ends_.size(); }

  std::int64_t value(std::size_t index, const std::vector<std::int64_t>& variables) const {
    std::int64_t sum = 0;
    for (std::size_t i = index == 0 ? 0 : ends_[index - 1]; i < ends_[index]; ++i)
      sum += terms_[i].second * variables[terms_[i].first];
    return sum;
  }

 private:
  Terms terms_;
  std::vector<std::size_t> ends_;
};

// What makes a variable of two sums.
enum class Operation { add, floor_divide, maximum, minimum };

inline std::int64_t apply(Operation operation, std::int64_t left, std::int64_t right) {
  switch (operation) {
    case Operation::add:
      return left + right;
    case Operation::maximum:
      return std::max(left, right);
    case Operation::minimum:
      return std::min(left, right);
    case Operation::floor_divide:
      break;
  }
  if (right == 0) throw std::domain_error("formulas: division by zero");
  return left / right - (left % right != 0 && (left < 0) != (right < 0));
}

// Adds the class Formulas to a module.
void bind_formulas(pybind11::module_& m);

}  // namespace msd
