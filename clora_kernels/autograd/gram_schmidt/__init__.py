"""The public functions of Gram-Schmidt."""

from .functions import OrthonormalBasis, gram_schmidt, gram_schmidt_foreach, orthonormal_basis

__all__ = ["OrthonormalBasis", "gram_schmidt", "gram_schmidt_foreach", "orthonormal_basis"]
