#include "winograd.h"

#include <algorithm>

#include "isa.h"
#include "parallel.h"
#include "winograd_unit.h"
#include "workspace.h"

namespace msd {
namespace {

// Of the transformed maps that all threads share: they are to stay in the last level's cache.
constexpr int64_t kConvBytes = int64_t{12} << 20;
// Pieces are worked on together up to this size.
constexpr int64_t kConvBlockBytes = int64_t{4} << 20;
constexpr int64_t kGradientBytes = int64_t{24} << 20;
// Tiles of a stage that are worked on at a time. More would not make the weights' transforms, which
// are done for each such piece anew, much cheaper.
constexpr int64_t kConvTiles = 168;
constexpr int64_t kGradientTiles = 256;
constexpr int64_t kLeastTiles = 28;
// Output channels of a task, so that its weights and products stay in a core's own cache.
constexpr int64_t kConvOutputs = 32;
constexpr int64_t kSourceChannels = 64, kCotangentChannels = 96;
// Tiles that a thread transforms at a time.
constexpr int64_t kTransformedTiles = 8;
// What a multiplication costs of an element that `useful_threads` has in mind.
constexpr int64_t kProductsPerUseful = 64;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

TileGrid grid_of(const ConvSize& size) {
  return {size.height, size.width, ceil_div(size.height, kTileSide),
          ceil_div(size.width, kTileSide), size.sampling};
}

template <class Map>
int64_t channels_of(const Map (&maps)[2]) {
  return maps[0].channels + maps[1].channels;
}

int64_t threads_for(int64_t products) { return useful_threads(products / kProductsPerUseful); }

// Equal shares of `total`, multiples of `unit`, of at most about `most`.
int64_t even_share(int64_t total, int64_t most, int64_t unit) {
  return std::min(total, round_up(ceil_div(total, ceil_div(total, most)), unit));
}

// f(range) for at most `most` neighbouring channels of one of the maps at a time.
template <class Map, class F>
void for_each_range(const Map (&maps)[2], int64_t most, const F& f) {
  int64_t joint = 0;
  for (int64_t m = 0; m < 2; ++m) {
    for (int64_t channel = 0; channel < maps[m].channels; channel += most) {
      f(ChannelRange{m, channel, joint + channel, std::min(most, maps[m].channels - channel)});
    }
    joint += maps[m].channels;
  }
}

// Parts of a list's entries that a thread takes at a time.
struct Part {
  int64_t entry, first, count;
};

template <class Entry>
std::vector<Part> parts_of(const std::vector<Entry>& entries) {
  std::vector<Part> parts;
  for (size_t e = 0; e < entries.size(); ++e) {
    for (int64_t first = 0; first < entries[e].tiles; first += kTransformedTiles) {
      const int64_t count = std::min(kTransformedTiles, entries[e].tiles - first);
      parts.push_back({static_cast<int64_t>(e), first, count});
    }
  }
  return parts;
}

// The pieces that are in the cache at a time. Their matrices begin at offsets in floats.
struct ConvBlock {
  std::vector<ConvPiece> pieces;
  std::vector<int64_t> offsets;
  int64_t floats = 0;
};

class Conv {
 public:
  explicit Conv(const ConvJob& job)
      : job_(job),
        kernels_(MSD_FOR_THIS_CPU(winograd_kernels)(job.size.type)),
        context_{&job, grid_of(job.size)} {
    int64_t products = 0;
    for (const ConvStage& stage : job.stages) {
      products += stage.samples * context_.grid.tiles() * kPoints * channels_of(stage.in) *
                  channels_of(stage.out);
      add(stage);
    }
    threads_ = threads_for(products);
  }

  void run() {
    if (blocks_.empty()) return;
    int64_t floats = 0;
    for (const ConvBlock& block : blocks_) floats = std::max(floats, block.floats);
    const int64_t scratch = weight_floats_ + product_floats_;
    const Workspace workspace(floats + threads_ * scratch);
    for (ConvBlock& block : blocks_) {
      for (size_t i = 0; i < block.pieces.size(); ++i) {
        block.pieces[i].inputs = workspace.data() + block.offsets[i];
      }
      transform_inputs(block);
      const std::vector<ConvTask> tasks = tasks_of(block);
      for_each_by_worker(static_cast<int64_t>(tasks.size()), threads_,
                         [&](int64_t i, int64_t worker) {
                           float* own = workspace.data() + floats + worker * scratch;
                           kernels_.conv_outputs(context_, tasks[i], {own, own + weight_floats_});
                         });
    }
  }

 private:
  void add(const ConvStage& stage) {
    const int64_t tiles = stage.samples * context_.grid.tiles();
    if (tiles == 0) return;
    const int64_t depth = channels_of(stage.in);
    const int64_t chunk = std::min(kMostChannels, round_up(depth, kernels_.pair));
    const int64_t fitting = kConvBytes / (kPoints * depth * sizeof(float));
    const int64_t most =
        std::clamp(fitting / kernels_.rows * kernels_.rows, kLeastTiles, kConvTiles);
    const int64_t share = even_share(tiles, most, kernels_.rows);
    for (int64_t first = 0; first < tiles; first += share) {
      const int64_t count = std::min(share, tiles - first);
      const int64_t stride = count * chunk + kPointPadding;
      ConvPiece piece = {&stage, first, count, depth, chunk, kPoints * stride, stride, nullptr};
      place(piece, ceil_div(depth, chunk) * piece.chunk_floats);
    }
    const int64_t width = std::min(kConvOutputs, round_up(channels_of(stage.out), kernels_.pair));
    weight_floats_ = std::max(weight_floats_, kPoints * (width * chunk + kPointPadding));
    product_floats_ = std::max(product_floats_, kPoints * (width * share + kPointPadding));
  }

  // Into the last block, if there is room.
  void place(const ConvPiece& piece, int64_t floats) {
    const int64_t most = kConvBlockBytes / static_cast<int64_t>(sizeof(float));
    if (blocks_.empty() || blocks_.back().floats + floats > most) blocks_.emplace_back();
    ConvBlock& block = blocks_.back();
    block.pieces.push_back(piece);
    block.offsets.push_back(block.floats);
    block.floats += floats;
  }

  void transform_inputs(const ConvBlock& block) {
    const std::vector<Part> parts = parts_of(block.pieces);
    for_each_dynamic(static_cast<int64_t>(parts.size()), threads_, [&](int64_t i) {
      const Part& part = parts[i];
      kernels_.conv_inputs(context_, block.pieces[part.entry], part.first, part.count);
    });
  }

  // Enough of them for all threads: of few outputs first, then of a part of a piece's tiles.
  std::vector<ConvTask> tasks_of(const ConvBlock& block) const {
    std::vector<ConvTask> tasks = tasks_of(block, kConvOutputs, 1);
    const auto enough = [&] { return static_cast<int64_t>(tasks.size()) >= 3 * threads_; };
    if (threads_ == 1 || enough()) return tasks;
    tasks = tasks_of(block, kernels_.pair, 1);
    for (int64_t parts = 2; parts <= kConvTiles / kLeastTiles && !enough(); ++parts) {
      tasks = tasks_of(block, kernels_.pair, parts);
    }
    return tasks;
  }

  std::vector<ConvTask> tasks_of(const ConvBlock& block, int64_t outputs, int64_t parts) const {
    std::vector<ConvTask> tasks;
    for (const ConvPiece& piece : block.pieces) {
      const int64_t tiles = std::max(ceil_div(piece.tiles, parts), kLeastTiles);
      for_each_range(piece.stage->out, outputs, [&](ChannelRange range) {
        if (piece.stage->out[range.map].data == nullptr) return;
        const int64_t width = round_up(range.count, kernels_.pair);
        for (int64_t first = 0; first < piece.tiles; first += tiles) {
          tasks.push_back({&piece, first, std::min(tiles, piece.tiles - first), range, width});
        }
      });
    }
    return tasks;
  }

  const ConvJob& job_;
  const WinogradKernels kernels_;
  const ConvContext context_;
  std::vector<ConvBlock> blocks_;
  int64_t threads_ = 1, weight_floats_ = 0, product_floats_ = 0;
};

// A piece of a stage with its panels of sources and cotangents.
struct PanelledPiece : GradientPiece {
  std::vector<GradientPanel> sources, cotangents;
};

// No two pieces of a stage are in a block: they add to the same gradient, in order.
struct GradientBlock {
  std::vector<PanelledPiece> pieces;
  int64_t floats = 0;
};

class WeightGradient {
 public:
  explicit WeightGradient(const WeightGradientJob& job)
      : kernels_(MSD_FOR_THIS_CPU(winograd_kernels)(job.size.type)),
        context_{&job, grid_of(job.size)} {
    int64_t products = 0;
    for (const WeightGradientStage& stage : job.stages) {
      products += stage.samples * context_.grid.tiles() * kPoints * channels_of(stage.in) *
                  stage.cotangent.channels;
    }
    threads_ = threads_for(products);
    for (const WeightGradientStage& stage : job.stages) add(stage);
  }

  void run() {
    if (blocks_.empty()) return;
    int64_t floats = 0;
    for (const GradientBlock& block : blocks_) floats = std::max(floats, block.floats);
    const Workspace workspace(floats + threads_ * scratch_floats_);
    for (GradientBlock& block : blocks_) {
      set_matrices(block, workspace.data());
      transform_maps(block);
      multiply(block, workspace.data() + floats);
    }
  }

 private:
  struct PanelPair {
    int64_t piece, source, cotangent;
  };

  // Panels are smaller where there would be fewer pairs of them than threads; no sum depends on it.
  void add(const WeightGradientStage& stage) {
    const int64_t tiles = stage.samples * context_.grid.tiles();
    if (tiles == 0) return;
    const int64_t channels = channels_of(stage.in) + stage.cotangent.channels;
    const int64_t fitting = kGradientBytes / (kPoints * channels * sizeof(float));
    const int64_t share = even_share(tiles, std::clamp(fitting, kLeastTiles, kGradientTiles), 1);
    int64_t width = std::min(kSourceChannels, round_up(channels_of(stage.in), kernels_.pair));
    int64_t height =
        std::min(kCotangentChannels, round_up(stage.cotangent.channels, kernels_.pair));
    const auto pairs = [&] {
      return ceil_div(channels_of(stage.in), width) * ceil_div(stage.cotangent.channels, height);
    };
    while (threads_ > 1 && pairs() < 3 * threads_ && height > kernels_.pair) {
      height = round_up(height / 2, kernels_.pair);
    }
    while (threads_ > 1 && pairs() < 3 * threads_ && width > kernels_.pair) {
      width = round_up(width / 2, kernels_.pair);
    }
    const int64_t stride = height * width + kPointPadding;
    scratch_floats_ = std::max(scratch_floats_, kPoints * stride);
    for (int64_t first = 0; first < tiles; first += share) {
      PanelledPiece piece;
      piece.stage = &stage;
      piece.first = first;
      piece.tiles = std::min(share, tiles - first);
      piece.add = first > 0;
      for_each_range(stage.in, width, [&](ChannelRange range) {
        piece.sources.push_back(panel(range, width, piece.tiles));
      });
      const SourceMap cotangents[2] = {stage.cotangent, {}};
      for_each_range(cotangents, height, [&](ChannelRange range) {
        piece.cotangents.push_back(panel(range, height, piece.tiles));
      });
      place(std::move(piece));
    }
  }

  GradientPanel panel(ChannelRange range, int64_t width, int64_t tiles) const {
    const int64_t stride = tiles * width + kPointPadding;
    return {range, width, {nullptr, kernels_.pair, tiles, stride}};
  }

  void place(PanelledPiece piece) {
    const int64_t most = kGradientBytes / static_cast<int64_t>(sizeof(float));
    int64_t floats = 0;
    for (const auto* panels : {&piece.sources, &piece.cotangents}) {
      for (const GradientPanel& panel : *panels) floats += kPoints * panel.matrices.stride;
    }
    if (blocks_.empty() || piece.add || blocks_.back().floats + floats > most) {
      blocks_.emplace_back();
    }
    blocks_.back().pieces.push_back(std::move(piece));
    blocks_.back().floats += floats;
  }

  static void set_matrices(GradientBlock& block, float* data) {
    for (PanelledPiece& piece : block.pieces) {
      for (auto* panels : {&piece.sources, &piece.cotangents}) {
        for (GradientPanel& panel : *panels) {
          panel.matrices.data = data;
          data += kPoints * panel.matrices.stride;
        }
      }
    }
  }

  void transform_maps(const GradientBlock& block) {
    const std::vector<Part> parts = parts_of(block.pieces);
    for_each_dynamic(static_cast<int64_t>(parts.size()), threads_, [&](int64_t i) {
      const auto& [entry, first, count] = parts[i];
      const PanelledPiece& piece = block.pieces[entry];
      for (const GradientPanel& panel : piece.sources) {
        kernels_.gradient_sources(context_, piece, panel, first, count);
      }
      for (const GradientPanel& panel : piece.cotangents) {
        kernels_.gradient_cotangents(context_, piece, panel, first, count);
      }
    });
  }

  void multiply(const GradientBlock& block, float* scratch) {
    std::vector<PanelPair> pairs;
    for (size_t p = 0; p < block.pieces.size(); ++p) {
      for (size_t d = 0; d < block.pieces[p].cotangents.size(); ++d) {
        for (size_t v = 0; v < block.pieces[p].sources.size(); ++v) {
          pairs.push_back(
              {static_cast<int64_t>(p), static_cast<int64_t>(v), static_cast<int64_t>(d)});
        }
      }
    }
    for_each_by_worker(static_cast<int64_t>(pairs.size()), threads_,
                       [&](int64_t i, int64_t worker) {
                         const PanelledPiece& piece = block.pieces[pairs[i].piece];
                         kernels_.gradient_weights(piece, piece.cotangents[pairs[i].cotangent],
                                                   piece.sources[pairs[i].source],
                                                   scratch + worker * scratch_floats_);
                       });
  }

  const WinogradKernels kernels_;
  const GradientContext context_;
  std::vector<GradientBlock> blocks_;
  int64_t threads_ = 1, scratch_floats_ = 0;
};

}  // namespace

void winograd_conv(const ConvJob& job) { Conv(job).run(); }

void winograd_weight_gradient(const WeightGradientJob& job) { WeightGradient(job).run(); }

}  // namespace msd
