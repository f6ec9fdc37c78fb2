"""Finding the stages: which noise levels should share a decoder (arXiv 2312.09181).

Noise levels belong together where the optimal denoisers of the data agree:

    find_stages         all of it in one call: from images to stages

    similarity_matrix   how far they agree, for all pairs of noise levels
    split, sweep        the best stages of any number, exactly
    split_from_ends     the paper's three stages
    suggest_widths      how wide each stage's decoder should be, given a compute budget
    gradient_similarity, split_uniformly       the alternatives of the paper's ablation
"""

from multistage_diffusion.clustering.find import FoundStages, Rule, find_stages
from multistage_diffusion.clustering.gradients import gradient_similarity
from multistage_diffusion.clustering.similarity import Similarity, similarity_matrix
from multistage_diffusion.clustering.splits import Split, split, split_from_ends, split_uniformly, sweep
from multistage_diffusion.clustering.widths import suggest_widths

__all__ = [
    "FoundStages",
    "Rule",
    "Similarity",
    "Split",
    "find_stages",
    "gradient_similarity",
    "similarity_matrix",
    "split",
    "split_from_ends",
    "split_uniformly",
    "suggest_widths",
    "sweep",
]
