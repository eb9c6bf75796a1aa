"""`inbatch bench`: throughput on this machine, compared with its hardware peak and with other libraries."""
