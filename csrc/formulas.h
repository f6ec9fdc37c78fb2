// Integers that follow from a call's counts, evaluated anew for each call.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <tuple>
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

// Formulas of a call's counts.
class Formulas {
 public:
  using Step = std::tuple<std::string, Terms, Terms>;

  Formulas(const std::vector<Step>& steps, const std::vector<Terms>& outputs) {
    const std::map<std::string, Operation> operations{{"+", Operation::add},
                                                      {"//", Operation::floor_divide},
                                                      {"max", Operation::maximum},
                                                      {"min", Operation::minimum}};
    for (const auto& [name, left, right] : steps) {
      operations_.push_back(operations.at(name));
      operands_.add(left);
      operands_.add(right);
    }
    for (const Terms& output : outputs) {
      outputs_.add(output);
      // Most cells of a table do not depend on the counts: their numbers are made once.
      const bool varies = std::any_of(output.begin(), output.end(),
                                      [](const auto& term) { return term.first != 0; });
      constants_.push_back(varies ? pybind11::object()
                                  : pybind11::int_(outputs_.value(outputs_.size() - 1, {1})));
    }
  }

  pybind11::tuple operator()(const pybind11::tuple& counts) {
    variables_.assign(1, 1);
    for (const pybind11::handle count : counts) variables_.push_back(count.cast<std::int64_t>());
    for (std::size_t i = 0; i < operations_.size(); ++i)
      variables_.push_back(apply(operations_[i], operands_.value(2 * i, variables_),
                                 operands_.value(2 * i + 1, variables_)));
    pybind11::tuple values(outputs_.size());
    for (std::size_t i = 0; i < values.size(); ++i)
      values[i] = constants_[i] ? constants_[i] : pybind11::int_(outputs_.value(i, variables_));
    return values;
  }

 private:
  std::vector<Operation> operations_;
  Sums operands_, outputs_;
  std::vector<pybind11::object> constants_;  // of the outputs; none where one varies
  std::vector<std::int64_t> variables_;      // of the call that holds the interpreter's lock
};

// Adds the class Formulas to a module.
inline void bind_formulas(pybind11::module_& m) {
  pybind11::class_<Formulas>(m, "Formulas",
                             "What msd_kernels.runtime.formulas.Formulas is, compiled.")
      .def(pybind11::init<const std::vector<Formulas::Step>&, const std::vector<Terms>&>(),
           pybind11::arg("steps"), pybind11::arg("outputs"))
      .def("__call__", &Formulas::operator(), pybind11::arg("counts"));
}

}  // namespace msd
