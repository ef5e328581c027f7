"""The queues of devices other than the CPU, one module for each type that has its own."""
