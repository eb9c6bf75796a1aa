"""Reports as images and text: batch context, crops, data sets, views."""
