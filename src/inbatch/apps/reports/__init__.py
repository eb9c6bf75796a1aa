"""Reports as pages, text and figures: batch context, crops, data sets, views."""
