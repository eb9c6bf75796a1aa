"""What this machine makes of inbatch, beside what it could and beside other libraries: `inbatch bench`."""
