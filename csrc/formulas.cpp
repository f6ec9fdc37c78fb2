// Plans for new counts, from Python.
#include "formulas.h"

#include <pybind11/stl.h>

#include <map>
#include <string>
#include <tuple>

namespace py = pybind11;
using py::literals::operator""_a;

namespace {

// Formulas of a call's counts whose first values are the cells of a launch's tables.
class Formulas {
 public:
  using Step = std::tuple<std::string, msd::Terms, msd::Terms>;

  Formulas(const std::vector<Step>& steps, const std::vector<msd::Terms>& outputs,
           std::size_t cells)
      : cells_(cells) {
    if (cells > outputs.size()) throw std::invalid_argument("formulas: more cells than outputs");
    const std::map<std::string, msd::Operation> operations{{"+", msd::Operation::add},
                                                           {"//", msd::Operation::floor_divide},
                                                           {"max", msd::Operation::maximum},
                                                           {"min", msd::Operation::minimum}};
    for (const auto& [name, left, right] : steps) {
      operations_.push_back(operations.at(name));
      operands_.add(left);
      operands_.add(right);
    }
    for (const msd::Terms& output : outputs) outputs_.add(output);
  }

  // Writes the cells where there is room for them; returns the values of the other outputs.
  py::tuple operator()(const py::tuple& counts, std::uintptr_t address) {
    variables_.assign(1, 1);
    for (const py::handle count : counts) variables_.push_back(count.cast<std::int64_t>());
    for (std::size_t i = 0; i < operations_.size(); ++i)
      variables_.push_back(msd::apply(operations_[i], operands_.value(2 * i, variables_),
                                      operands_.value(2 * i + 1, variables_)));
    auto* cells = reinterpret_cast<std::int64_t*>(address);
    for (std::size_t i = 0; i < cells_; ++i) cells[i] = outputs_.value(i, variables_);
    py::tuple others(outputs_.size() - cells_);
    for (std::size_t i = 0; i < others.size(); ++i)
      others[i] = outputs_.value(cells_ + i, variables_);
    return others;
  }

 private:
  std::vector<msd::Operation> operations_;
  msd::Sums operands_, outputs_;
  std::size_t cells_;
  std::vector<std::int64_t> variables_;  // of the call that holds the interpreter's lock
};

}  // namespace

void msd::bind_formulas(py::module_& m) {
  py::class_<Formulas>(m, "Formulas", "What msd_kernels.runtime.formulas.Formulas is, compiled.")
      .def(py::init<const std::vector<Formulas::Step>&, const std::vector<msd::Terms>&,
                    std::size_t>(),
           "steps"_a, "outputs"_a, "cells"_a)
      .def("__call__", &Formulas::operator(), "counts"_a, "address"_a = 0);
}
