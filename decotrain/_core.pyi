"""decotrain's collective core"""
