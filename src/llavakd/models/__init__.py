"""Models: parts.py loads, student.py joins, alignment.py compares, fast.py and quantized.py make them cheaper to run."""
