"""What every benchmark uses: libraries under comparison, fields, clocks, memory, the machine, tables, plots."""
