"""The page of `inbatch explore`: a map of the images of a collection in one HTML file."""
