"""`jaxserve plan`: whether a model fits a slice that is not here, and how fast it could be there."""
