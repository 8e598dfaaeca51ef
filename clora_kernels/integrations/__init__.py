"""The package's layers in other libraries."""
