"""The rooms behind `runtime.plan`: shapes, costs, what fits, and how it is said."""
