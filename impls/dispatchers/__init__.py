"""Expert-parallel dispatchers, one file per scheme; `dispatcher` holds their registered names."""
